"""What `planner profile` measures, through the lanes and handlers that execute plans."""
