"""What a run will take before it is started: memory of a GPU, hours, disk; counted on models without weights."""
