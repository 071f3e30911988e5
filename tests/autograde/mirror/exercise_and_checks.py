# %% [markdown]
# **Exercise.** Return twice `x`.
#
# <details><summary>Hint 1</summary>What is `x + x`?</details>


# %% exercise="double" difficulty=2 minutes=5
def double(x: float) -> float:
    """Return twice x."""
    ### BEGIN SOLUTION
    return 2 * x
    ### END SOLUTION


# %% check="double" points=1
assert double(3) == 6, "Twice three is six"
### BEGIN HIDDEN TESTS
assert double(-1.5) == -3, "Keep the sign"
### END HIDDEN TESTS

# %% check="double" points=2
assert double(0) == 0, "Twice nothing is nothing"


# %% mistake="squares" of="double" says="Twice three is six"
def double(x):
    return x * x


assert double  # the linter sees a use


# %% alternative="adds" of="double"
def double(x):
    return x + x


# %% [markdown]
# Write a number down.

# %% exercise="guess" difficulty=1 minutes=5
guess = None
### BEGIN SOLUTION
guess = double(21)
### END SOLUTION

# %% check="guess" points=1
assert guess is not None, "Write a number"

# %%
print(guess)
