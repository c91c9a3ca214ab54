"""Programs that the bench drives or measures against, each a process of its own."""
