"""Sandbox: the machines in which agents work, and the agents themselves. Leaf of the tree, child of task."""
