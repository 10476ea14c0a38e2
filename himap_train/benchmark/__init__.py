"""Does the saving arrive? Dense and pruned in pairs on one machine: time, memory and cache against the cost model."""
