"""The process that owns a mount, whoever serves it. `supervisor` decides; the other rooms do what it decides on.

loop            poll(2) and timers
estate          what must not die with a daemon: descriptors, ledger, sockets
daemon          starting and ending daemons
replacement     asking for another version to take over, and handing this very process on to it
"""
