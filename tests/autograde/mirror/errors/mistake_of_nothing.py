# %% exercise="one" difficulty=1 minutes=5
### BEGIN SOLUTION
one = 1
### END SOLUTION

# %% check="one" points=1
assert one == 1, "One is one"

# %% mistake="two" of="two" says="One is one"
one = 2

# %% alternative="an alias" of="three"
one = 1
