"""The planner: memory and step time of a layout, before it runs."""
