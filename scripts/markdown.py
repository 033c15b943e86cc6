"""Tables in Markdown, and the blocks of published pages that commands renew."""

from cli import UserError
from runs.files import write_whole


def table(head, rows):
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def block(page, begin, end):
    """The text between two marks of a page, a Path."""
    return page.read_text(encoding="utf-8").split(begin)[1].split(end)[0].strip()


def renew(page, begin, end, text, space="\n"):
    """Put `text` between two marks of a page, with `space` around it."""
    content = page.read_text(encoding="utf-8")
    if begin not in content or end not in content:
        raise UserError(f"{page} lacks the marks {begin} and {end}, between which it is renewed")
    before, after = content.split(begin)[0], content.split(end)[1]
    write_whole(page, f"{before}{begin}{space}{text}{space}{end}{after}")
