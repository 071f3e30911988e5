# %% exercise="one" check="one" points=1 difficulty=1 minutes=5
one = 1

# %% [markdown] check="one" points=1
# Prose
