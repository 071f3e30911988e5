"""A module docstring."""

# %%
one = 1
