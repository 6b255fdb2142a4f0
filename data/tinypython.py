"""Grading one-line Python functions without running them: the tree is walked by us, never by the interpreter.

    grade("def f(xs):\n return max(x*x for x in xs if x>0)", gold, inputs) -> Outcome

The language is what the toy code task needs and a little more: integers, names, + - * // % **, comparisons, one-loop
comprehensions, and max min sum sorted list len abs of one argument. There is nothing in it to escape with, and every
evaluation is bounded: 400 characters, 2,000 nodes, 32 levels, 64-bit integers. Outside it, or over a bound: ungradable.
"""
import ast
import operator
from itertools import count

from data.grading import Outcome, never_raises

_BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
           ast.Mod: operator.mod, ast.Pow: operator.pow}
_COMPARE = {ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
            ast.GtE: operator.ge}
_BUILTINS = {"max": max, "min": min, "sum": sum, "sorted": sorted, "list": list, "len": len, "abs": abs}


class Unsupported(ValueError):
    """Outside the language or over a bound."""


@never_raises
def grade(response: str, gold: str, inputs: list[list[int]]) -> Outcome:
    """RIGHT if the function f of the response and that of `gold` agree on every input; WRONG if they differ somewhere,
    or if f would raise in Python; UNGRADABLE if the response holds no such function."""
    try:
        expected = [call(*parse_function(gold), numbers) for numbers in inputs]
        function = parse_function(response)
        # compared by repr, because True == 1
        same = all(repr(call(*function, numbers)) == repr(value) for numbers, value in zip(inputs, expected))
        return Outcome.RIGHT if same else Outcome.WRONG
    except Unsupported:
        return Outcome.UNGRADABLE
    except (TypeError, ValueError, ZeroDivisionError, NameError):
        return Outcome.WRONG


def parse_function(text: str) -> tuple[str, ast.expr]:
    """(argument name, returned expression) of f in a response: its last fenced block, or all of it if it has none."""
    fences = text.split("```")
    source = fences[-2].removeprefix("python") if len(fences) >= 3 else text
    if len(source) > 400:  # the longest gold has 60; this also bounds the recursion inside Python's own parser
        raise Unsupported("too long")
    try:
        body = ast.parse(source.strip()).body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:  # ValueError: NUL or a lone surrogate
        raise Unsupported(str(error)) from None
    match body:
        case [ast.FunctionDef(name="f", decorator_list=[], body=[ast.Return(value=ast.expr() as returned)],
                              args=ast.arguments(posonlyargs=[], args=[argument], vararg=None, kwonlyargs=[],
                                                 kwarg=None, defaults=[]))]:
            return argument.arg, returned
    raise Unsupported("expected one function f of one argument, and in it one return")


def call(argument: str, returned: ast.expr, value: list[int]):
    """Value of the returned expression where `argument` is `value`. Raises Unsupported, or what Python would:
    TypeError, ValueError, ZeroDivisionError, NameError."""
    steps = count(1)

    def walk(node, names, depth):
        if next(steps) > 2000 or depth > 32:
            raise Unsupported("too slow or too deep")
        match node:
            case ast.Constant(value=int() as result):
                pass
            case ast.Name(id=name):
                if name not in names:
                    raise NameError(name)
                result = names[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                result = -walk(operand, names, depth + 1)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                left, right = walk(left, names, depth + 1), walk(right, names, depth + 1)
                if not (isinstance(left, int) and isinstance(right, int)):
                    raise Unsupported("arithmetic is on integers")  # in Python, [0] * 10**9 is a list
                if isinstance(op, ast.Pow) and not 0 <= right <= 8:
                    raise Unsupported("exponent")
                result = _BINARY[type(op)](left, right)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
                result = _COMPARE[type(op)](walk(left, names, depth + 1), walk(right, names, depth + 1))
            case ast.ListComp(elt=element, generators=[loop]) | ast.GeneratorExp(elt=element, generators=[loop]):
                if not isinstance(loop.target, ast.Name):
                    raise Unsupported("loop target")
                result = []
                for item in walk(loop.iter, names, depth + 1):
                    inner = {**names, loop.target.id: item}
                    if all(walk(test, inner, depth + 1) for test in loop.ifs):
                        result.append(walk(element, inner, depth + 1))
                if isinstance(node, ast.GeneratorExp):
                    result = tuple(result)  # there are no other tuples: one stands for a generator, which is no list
            case ast.Call(func=ast.Name(id=name), args=[inner], keywords=[]) if name in _BUILTINS:
                result = walk(inner, names, depth + 1)
                if name == "len" and isinstance(result, tuple):
                    raise TypeError("a generator has no length")
                result = _BUILTINS[name](result)
            case _:
                raise Unsupported(type(node).__name__)
        if isinstance(result, int) and abs(result) >= 1 << 63:
            raise Unsupported("integer too large")
        return result

    return walk(returned, {argument: value}, 0)
