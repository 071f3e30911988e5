# %% [markdown]
# # Start here
#
# You know machine learning research. This path turns that into engineering you can show: you finetune language
# models, measure what you did, and grade yourself against tests you cannot see. Everything runs on two CPU cores
# without a network, on a language model small enough to finetune on a CPU.
#
# ## The path
#
# Open a lesson by its link. Each takes 50–90 minutes and stands alone.
#
# {{path:map}}

# %% [markdown]
# ## How a lesson works
#
# 1. Read from the top and run each cell with <kbd>Shift</kbd>+<kbd>Enter</kbd>.
# 2. An exercise has a cell with `# YOUR CODE HERE`. Write your answer there. Three hints are folded under each
#    statement; open one when you have been stuck for five minutes.
# 3. Run the check cell below it. When it fails, its message names the mistake and the way out.
# 4. **Validate** in the notebook's toolbar runs the whole notebook from a fresh kernel, so that nothing works only
#    because you ran cells out of order. A notebook with an unfinished exercise does not validate yet.
#    A training takes its time; with the values that the parameters cell names after `quick:`, the lesson runs through
#    in seconds and measures nothing. No check depends on them.
# 5. When the visible checks pass, grade the lesson. In a terminal (*File → New → Terminal*):
#
# ```
# course check 2.1
# ```
#
# This runs your notebook in a sandbox with hidden tests on fresh cases and prints, for each exercise, your points,
# what is wrong, and the next hint. It only reads your notebook. Add `--html` for the full feedback page.
#
# | you want to | type |
# |---|---|
# | see how far you are | `course progress` |
# | begin a lesson again (yours is kept in a backup) | `course reset 2.1` |
# | find out why something does not start | `course doctor` |
# | see a model answer: **after** you tried | open the lesson's file under `solutions/`, which opens as a notebook |

# %% [markdown]
# ## Your progress
#
# Run this cell whenever you want to see your map.

# %%
# !course progress

# %% [markdown]
# ## What you leave with
#
# Every lesson ends with a result card: the numbers your own run measured, with their intervals. Each number in the
# text was measured the same way, by a run of the lesson that anyone can repeat with `course run`. When you show
# this work, show the card and the command.
