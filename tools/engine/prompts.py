"""The step-by-step questions of the quickstart, and those that tools/calibrate asks."""

from __future__ import annotations

WORKSHOP = """A small workshop builds wooden chairs and tables and wants to plan its next month. \
Please work through the plan step by step, write down every calculation, and check each result \
before you use it. Here are the facts. There are four carpenters, and each of them works 21 days \
in the month for 8 hours a day. A chair takes 3 hours of work and a table takes 7 hours. A chair \
needs 2 boards and 12 screws, a table needs 5 boards and 28 screws. A board costs 6 dollars and a \
box of 100 screws costs 9 dollars. A chair is sold for 55 dollars and a table for 140 dollars. The \
customers have already ordered 60 chairs and 25 tables. First find the hours that are available. \
Then find the hours that the orders need and how many hours are left. After that decide what to \
build in the remaining hours, compute the boards and screws for everything, the cost of the \
material, the income, and the profit. If you find a mistake, go back and correct it. At the end \
give a summary that a new carpenter would understand."""

LIBRARY = """A town library wants to lend electronic readers and asks you to think the problem \
through, one step at a time, and to explain the reason for every step. The library owns 120 \
readers. In the first week 45 of them are lent, in every following week 15 more people ask for \
one, and each reader comes back after exactly three weeks. A reader must be charged for one full \
day before it can be lent again, and about one reader in thirty is damaged during a loan and has \
to be repaired, which takes two weeks and costs 35 dollars. Describe week by week, for twelve \
weeks, how many readers are lent, how many come back, how many are in repair, and how many remain \
on the shelf. Say in which week the readers are no longer enough, if that happens at all. Then \
compare three remedies: buying 30 more readers for 90 dollars each, shortening the loan to two \
weeks, or keeping a waiting list. Work out what each remedy costs and what it gains, verify your \
numbers in a different way, correct anything that does not agree, and finish with a clear \
recommendation."""
ENGINES = {"engine-a": WORKSHOP, "engine-b": LIBRARY}

CALIBRATION = [
    "What is 37 times 43? Multiply step by step, then check the result in a second way.",
    "A train leaves at 9:40 and travels 210 km at 84 km per hour. When does it arrive? Show every "
    "step and verify the answer.",
    "Write a Python function that returns the n-th Fibonacci number, then trace it by hand for "
    "n = 7, line by line.",
    "Is 391 a prime number? Try the possible divisors one after another and explain why you may "
    "stop when you do.",
    "Three friends share 96 marbles in the ratio 3 : 4 : 5. How many does each one get? Check the "
    "sum. What changes if a fourth friend joins with share 4?",
    "Solve 3x + 7 = 2(x - 5) + 20 step by step. Put the solution back into the equation.",
    "Explain how binary search works, then find 41 in the list 3, 8, 15, 22, 29, 41, 57, 60, 73 "
    "and write down each comparison.",
    "A tank holds 240 litres. One pipe fills it in 6 hours, a second one empties it in 10 hours. "
    "Both are open. How long does it take to fill? Think again if the answer looks wrong.",
    "Wait until you are sure: does 0.999... equal 1? Give two different arguments and look for an "
    "error in each of them.",
    "Plan a garden of 6 by 9 metres with paths of 1 metre on all four sides. Compute the area of "
    "the paths and of the beds, and check that they add up.",
    "Prove that the sum of two odd numbers is even. Then test the statement with five examples and "
    "explain what examples can and cannot show.",
    "Describe how to sort the numbers 9, 4, 7, 1, 8, 2 by insertion, one move at a time, and count "
    "the comparisons.",
]
