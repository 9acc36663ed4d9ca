"""A coding agent that follows simple written instructions, one per line. It speaks ACP like any other agent.

    write PATH: TEXT      write a file
    append PATH: TEXT     add a line to a file
    run COMMAND           run a shell command
    commit MESSAGE        git add, commit
    push                  git push
    ask QUESTION          ask for permission, and stop if it is refused
    question TEXT         ask for words, with a form, and say them
    say TEXT              say something
    think TEXT            reason about something
    plan STEP; STEP       say what it means to do; a step may begin with its priority and state: "high done Read"
    image BYTES           show an image of so many bytes
    mode ID, model ID     go on in another mode, with another model
    usage INPUT OUTPUT    say at the end how many tokens were used
    stop REASON           end the turn for a reason of ACP's, such as max_tokens
    update JSON           send any session update as it is, such as a tool call, or one that nobody knows
    repeat N TEXT         say something N times, in as many chunks
    wait SECONDS          take its time
    fail MESSAGE          end the turn with an error
    die CODE              end the process in mid-turn

A line that is none of these is answered in words and otherwise passed over. Images and files that come with a prompt
are named.
"""
