# %% [markdown]
# Prose

# %% exercise="one" difficulty=1 minutes=5
### BEGIN SOLUTION
one = 1
### END SOLUTION
