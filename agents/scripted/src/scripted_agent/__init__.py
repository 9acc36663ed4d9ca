"""A coding agent that follows simple written instructions, one per line. It speaks ACP like any other agent.

    write PATH: TEXT      write a file
    append PATH: TEXT     add a line to a file
    run COMMAND           run a shell command
    commit MESSAGE        git add, commit
    push                  git push
    ask QUESTION          ask for permission, and stop if it is refused
    say TEXT              say something
    think TEXT            reason about something
    repeat N TEXT         say something N times, in as many chunks
    wait SECONDS          take its time
    fail MESSAGE          end the turn with an error
    die CODE              end the process in mid-turn

A line that is none of these is answered in words and otherwise passed over.
"""
