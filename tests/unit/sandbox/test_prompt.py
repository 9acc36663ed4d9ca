"""What an agent is given of a message and what is attached to it."""

import base64

from branchline.v1.common_pb2 import Attachment, BlobReference, FileExcerpt, Prompt

from services.sandbox.attachments import Placed, file_name
from services.sandbox.prompt import prompt_blocks

PICTURE = BlobReference(blob_id="blob_1", display_name="a b.png", media_type="image/png", size_bytes=3)


def test_excerpts_are_given_as_text_with_their_place() -> None:
    excerpt = FileExcerpt(path="a.py", start_line=3, end_line=5, commit="c" * 40, text="code")
    prompt = Prompt(text="Look", attachments=[Attachment(file_excerpt=excerpt)])
    assert prompt_blocks(prompt, {}) == [
        {"type": "text", "text": "Look"},
        {"type": "text", "text": f"Attached from a.py:3-5 at commit {'c' * 12}:\ncode"},
    ]


def test_a_picture_is_given_as_one_and_another_file_as_a_link_in_the_order_of_the_prompt() -> None:
    log = BlobReference(blob_id="blob_2", display_name="x.log", media_type="text/plain", size_bytes=9)
    prompt = Prompt(text="Look", attachments=[Attachment(blob=log), Attachment(blob=PICTURE)])
    placed = {"blob_1": Placed(PICTURE, "/h/a b.png", b"png"), "blob_2": Placed(log, "/h/x.log")}
    _, link, picture = prompt_blocks(prompt, placed)
    assert link == {
        "type": "resource_link",
        "uri": "file:///h/x.log",
        "name": "x.log",
        "mimeType": "text/plain",
        "size": 9,
    }
    assert (picture["type"], picture["mimeType"], picture["uri"]) == ("image", "image/png", "file:///h/a%20b.png")
    assert base64.b64decode(picture["data"]) == b"png"


def test_a_name_leads_nowhere_else() -> None:
    names = ["../../etc/passwd", "..", "", ".bashrc", "a\nb", "x" * 300]
    made = [file_name(BlobReference(display_name=name)) for name in names]
    assert made[:5] == ["passwd", "attachment", "_", "bashrc", "a_b"]
    assert len(made[5]) == 200
