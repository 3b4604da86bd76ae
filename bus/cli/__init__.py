"""The command line: it asks the library, and shows what that says.

app          the tree of commands; what goes wrong becomes a sentence and an exit code
options      what commands have in common, and the bus that they are about
output       tables for people, JSON lines for programs; nothing that a terminal would obey
consent      what changes something says what, and asks
progress     the bar of what takes long
entries      how an event is shown, and how one is chosen: `where` is an expression
the others   one command, or noun with its verbs, a file
"""
