"""The child process of rewards.RewardFile: loads the user's file, then answers one JSON line for each that it reads.

    in:   {"path", "function", "timeout", "root"}       once      out: {"convention": "event", "names": null} or {"error": "..."}
          {"args": [...], "kwargs": {...}}              per call       {"result": ...}                       or {"error": "..."}

Standard library only, and none of our modules: it starts in 50 ms. Descriptors 0 and 1 are taken away before the user's file is loaded, so
that what it prints goes to stderr and what it reads from standard input is empty; neither can be mistaken for a line of the protocol.
"""
import faulthandler
import importlib.util
import inspect
import json
import numbers
import os
import sys
import time
import traceback

ITEM = ("data_source", "solution_str", "ground_truth", "extra_info")        # verl's names, and their plurals for a whole batch
BATCH = ("data_sources", "solution_strs", "ground_truths", "extra_infos")
MAX_REPLY = 16 << 20        # bytes


class Context:
    """What AWS Lambda hands to a handler beside the event: the names that its documentation lists, with values that name nothing real."""
    function_name, function_version, memory_limit_in_mb, aws_request_id = "reward", "$LATEST", "128", "local"
    invoked_function_arn, log_group_name, log_stream_name = "arn:aws:lambda:local:0:function:reward", "local", "local"
    identity = client_context = None

    def __init__(self, timeout):
        self._end = time.monotonic() + timeout

    def get_remaining_time_in_millis(self):
        return max(0, int(1000 * (self._end - time.monotonic())))


def convention(function):
    """-> ("event", None), ("samples", None), ("item", names) or ("batch", names): how to call it, and by which of verl's names."""
    parameters = inspect.signature(function).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    anything = any(p.kind == p.VAR_KEYWORD for p in parameters)
    if not inspect.iscoroutinefunction(function):
        for kind, names in (("item", ITEM), ("batch", BATCH)):
            if names[1] in takes and {p.name for p in required} <= set(names):
                return kind, [name for name in names if anything or name in takes]
        second = positional[1].lower() if len(positional) > 1 else ""
        if ("context" in second or second in ("ctx", "_", "__")) and len(required) <= 2 and required == list(parameters)[:len(required)]:
            return "event", None
        if len(required) == 1 == len(positional) and not anything and required[0].name == positional[0]:
            return "samples", None
    raise ValueError(f"expected f(event, context), f(samples), verl's f({', '.join(ITEM)}) or its plural f({', '.join(BATCH)}), found "
                     f"{'async ' * inspect.iscoroutinefunction(function)}{function.__name__}{inspect.signature(function)}")


def load(path, name, root):
    """The user's function. Its folder comes first in the search path, as if it were the script; our root last, for our graders."""
    sys.path[:0] = [os.path.dirname(os.path.abspath(path))]
    sys.path.append(root)
    spec = importlib.util.spec_from_file_location(os.path.splitext(os.path.basename(path))[0], path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module         # dataclasses and pickle look their module up here
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        there = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == spec.name and not n.startswith("_")]
        raise ValueError(f"expected a function {name}, found {', '.join(there) or 'none'}: name one with --reward_function")
    return function


def plain(value):
    """numpy's scalars are numbers, but not to json. Anything else that json does not know stays an error, as it is on Lambda."""
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def main():
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)

    def answer(work):
        try:
            reply = json.dumps(work(), default=plain).encode()
            if len(reply) > MAX_REPLY:
                reply = json.dumps({"error": f"the result is {len(reply)} bytes of JSON, the limit is {MAX_REPLY}"}).encode()
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            reply = json.dumps({"error": f"{type(error).__name__}: {error}"[:2000]}).encode()
        replies.write(reply + b"\n")
        replies.flush()

    job, function, how = json.loads(requests.readline()), None, None

    def start():
        nonlocal function, how
        function = load(job["path"], job["function"], job["root"])
        how, names = convention(function)
        return {"convention": how, "names": names}

    def call():
        more = [Context(job["timeout"])] if how == "event" else []
        return {"result": function(*request["args"], *more, **request["kwargs"])}

    answer(start)
    for line in requests:
        request = json.loads(line)
        # says on stderr where it hangs, and ends the process even if nobody is left to do so
        faulthandler.dump_traceback_later(job["timeout"], exit=True)
        answer(call)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
