"""What a run costs: phase timers, counted network calls, and the plan that foretells both."""
