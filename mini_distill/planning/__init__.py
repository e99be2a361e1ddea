"""What a run needs, from its configuration: memory, operations, time, disk, before a weight is read."""
