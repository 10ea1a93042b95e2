"""The fault script: a line for each point at which a process is killed, under what is to go on around it.

A line is what `atoll.runtime.faults` reads: party, point, what, and the n-th time. Those marked `often` are killed in
`make test`, all of them in `make test-slow`.
"""

TABLE = {
    # A run that nothing else happens to.
    "plain": """
        hub:posted:run.submitted:1
        hub:journalled:run.submitted:1          often
        hub:performed:run.submitted:1
        hub:posted:run.planned:1
        hub:journalled:run.planned:1            often
        hub:performed:run.planned:1
        hub:posted:run.joined:1
        hub:journalled:run.joined:2
        hub:performed:run.joined:1
        hub:posted:run.answered:4
        hub:journalled:run.answered:1
        hub:journalled:run.answered:5           often
        hub:performed:run.answered:2
        hub:performed:run.answered:6
        hub:performed:run.answered:9
        hub:posted:run.merged:1
        hub:posted:run.merged:4
        hub:journalled:run.merged:2
        hub:journalled:run.merged:4             often
        hub:performed:run.merged:3
        hub:performed:run.merged:6
        hub:posted:run.published:1
        hub:journalled:run.published:1          often
        hub:performed:run.published:1
        hub:giving:code:1
        hub:giving:weights:2
        hub:giving:weights:8
        hub:receiving:initialise:2
        hub:receiving:train:1
        hub:receiving:train:8                   often
        hub:spooled:initialise:1
        hub:spooled:train:3                     often
        hub:merging:weights:2                   often
        hub:publishing:model:1                  often
        site:assigned:probe:1                   often
        site:computed:probe:1
        site:sent:probe:1
        site:assigned:measure:1
        site:assigned:train:2
        site:assigned:evaluate:1
        site:fetched:train:2
        site:fetched:evaluate:1
        site:computed:measure:1
        site:computed:train:3                   often
        site:computed:evaluate:1
        site:encoded:train:2                    often
        site:marked:train:1
        site:marked:train:3                     often
        site:sending:train:2
        site:sending:train:5                    often
        site:sending:train:9
        site:sent:measure:1
        site:sent:train:2                       often
        site:sent:evaluate:1
        site:settled:train:1
        site:settled:train:3
        site:released:run:1                     often
    """,
    # The site that makes the first weights is the one to be killed.
    "first": """
        site:assigned:initialise:1
        site:computed:initialise:1
        site:sending:initialise:2
        site:sent:initialise:1
    """,
    # A hub that goes on with the run of one that was killed is killed as well.
    "restarted": """
        hub:resuming:run:1
        hub:posted:run.restarted:1
        hub:journalled:run.restarted:1          often
        hub:performed:run.restarted:1
    """,
    # A site has been killed just before.
    "lost": """
        hub:posted:run.lost:1
        hub:journalled:run.lost:1               often
        hub:performed:run.lost:1
    """,
    # A site brings an answer that cannot be taken, once.
    "rejected": """
        hub:posted:run.rejected:1
        hub:journalled:run.rejected:1           often
        hub:performed:run.rejected:1
    """,
    # It brings no others.
    "barred": """
        hub:posted:run.barred:1
        hub:journalled:run.barred:1
        hub:performed:run.barred:1
    """,
    # A site is slower than the deadline of the round, and the round needs it all the same.
    "expired": """
        hub:posted:run.expired:1
        hub:journalled:run.expired:1
        hub:performed:run.expired:1
    """,
    # An owner's rules refuse an update in the middle of the run.
    "refused": """
        hub:posted:run.refused:1
        hub:journalled:run.refused:1            often
        hub:performed:run.refused:1
    """,
    # The task breaks in the middle of the run.
    "broken": """
        hub:posted:run.broken:1
        hub:journalled:run.broken:1
        hub:performed:run.broken:1
    """,
    # Somebody cancels it.
    "cancelled": """
        hub:posted:run.cancelled:1
        hub:journalled:run.cancelled:1          often
        hub:performed:run.cancelled:1
    """,
    # A search of three trials, one at a time: the first is the best, the second is pruned, the third is as the first.
    "swept": """
        hub:posted:run.submitted:2
        hub:journalled:run.submitted:3
        hub:performed:run.submitted:4
        hub:posted:run.pruned:1
        hub:journalled:run.pruned:1             often
        hub:performed:run.pruned:1
        hub:posted:run.outdone:1
        hub:journalled:run.outdone:1            often
        hub:performed:run.outdone:1
        hub:posted:run.swept:1
        hub:journalled:run.swept:1              often
        hub:performed:run.swept:1
    """,
    # Workers are processes, too.
    "workers": """
        site:ordered:open:1
        site:ordered:probe:1
        site:ordered:initialise:1
        site:ordered:train:2
        site:ordered:evaluate:1
        worker:step:train:3
        worker:written:initialise:1
        worker:written:train:2
    """,
}
LINES = [(world, *line.split()) for world, lines in TABLE.items() for line in lines.strip().splitlines()]
