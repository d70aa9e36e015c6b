"""Solvers: from noise to a value through the many calls of a continuous head. One way of calling them all:
`solver(fn, noise, num_steps=..., ...)`."""
