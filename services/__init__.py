"""The services of Branchline: one room per level of the coordinator tree, and the runtime they stand on."""
