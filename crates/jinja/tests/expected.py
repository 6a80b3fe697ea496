#!/usr/bin/env python3
"""Renders templates with jinja2, in the environment of transformers.

    python3 crates/jinja/tests/expected.py           writes the outputs into cases.jsonl
    python3 crates/jinja/tests/expected.py --stdin   reads {"template", "variables"} a line, writes
                                                     {"text"} or {"raises"} a line

A new case is a line {"template": "..."} in cases.jsonl. Needs jinja2 3.1 (python3-jinja2).
"""

import datetime
import functools
import json
import pathlib
import sys

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = pathlib.Path(__file__).parent


class Generation(jinja2.ext.Extension):
    """The tag of transformers that marks assistant tokens."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("_generation")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _generation(self, caller):
        return caller()


class TemplateDict:
    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs):
        return dict.fromkeys(*args, **kwargs)


class TemplateNamespace(jinja2.utils.Namespace):
    def __setitem__(self, name, value):
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"cannot store {name!r} on a namespace")
        jinja2.utils.Namespace.__setitem__(self, name, value)


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment():
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    # The fixed date of this crate.
    env.globals["strftime_now"] = datetime.datetime(2024, 7, 26).strftime
    env.globals["dict"] = TemplateDict()
    env.globals["namespace"] = TemplateNamespace
    return env


ENVIRONMENT = environment()
compiled = functools.lru_cache(ENVIRONMENT.from_string)


def rendered(template, variables):
    try:
        return {"text": compiled(template).render(**variables)}
    except Exception as error:  # any exception: the crate must fail too
        return {"raises": f"{type(error).__name__}: {error}"}


def main():
    if sys.argv[1:] == ["--stdin"]:
        for line in sys.stdin:
            case = json.loads(line)
            print(json.dumps(rendered(case["template"], case["variables"]), ensure_ascii=False), flush=True)
        return
    variables = json.loads((HERE / "variables.json").read_text())
    path = HERE / "cases.jsonl"
    lines = []
    for line in path.read_text().splitlines():
        case = json.loads(line)
        kept = {key: case[key] for key in ("template", "refused") if key in case}
        lines.append(json.dumps(kept | rendered(case["template"], variables), ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n")


main()
