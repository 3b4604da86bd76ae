"""Seeing to it: what an operator does, through `Bus.admin` or the command line.

topics       `marks` changes what is recorded, `trim` removes history that nobody needs
groups       `groups` makes, moves and removes them; `pauses` stops what would start
consumers    `consumers` removes workers that are gone
pending      `pending` lists what was given out and is not finished, hurries it or gives it up
diagnosis    `doctor` looks at all there is, `diagnosis` judges it, each `finding` names what mends
             it; `checks` compares numbers with limits, `exposition` tells monitors
scope        which streams an operation is about
"""
