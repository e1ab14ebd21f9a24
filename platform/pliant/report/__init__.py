"""Tables and pictures of finished runs, from what a run folder holds."""
