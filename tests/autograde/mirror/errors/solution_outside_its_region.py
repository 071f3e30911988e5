# %%
### BEGIN SOLUTION
one = 1
### END SOLUTION

# %% exercise="one" difficulty=1 minutes=5
one = 1

# %% check="one" points=1
assert one == 1, "One is one"
