"""What a run costs: phase timers and counted network calls."""
