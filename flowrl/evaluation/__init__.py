"""Base against tuned: paired evaluation, statistics, picture grids, charts and the report."""
