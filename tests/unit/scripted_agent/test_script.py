"""The scripted agent's instructions."""

from scripted_agent.script import Instruction, read_script, split_file


def test_lines_become_instructions_and_the_rest_is_talk() -> None:
    script = read_script("Please help:\n- write a.txt: hi\nRUN ls -l\n\npush")

    assert script == [
        Instruction("talk", "Please help:"),
        Instruction("write", "a.txt: hi"),
        Instruction("run", "ls -l"),
        Instruction("push", ""),
    ]


def test_a_file_instruction_has_path_and_text() -> None:
    assert split_file("d/a.txt: one\\ntwo: three") == ("d/a.txt", "one\ntwo: three")
