"""The imports of a checkout as a drawing: rooms (packages, and modules that lie in none), floors, arrows and circles.

    python -m tests.support.house [CHECKOUT]
"""
import ast
import sys
from functools import cache, cached_property
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


class House:
    """The package hpcfl of a checkout: its files, and who imports whom, also inside functions and for type checkers alone."""

    def __init__(self, root: Path):
        self.root = root
        self.files = sorted((root / "hpcfl").rglob("*.py"))
        self.modules = {self.module_of(path): path for path in self.files}

    def module_of(self, path: Path) -> str:
        """The dotted name of a file's module."""
        return ".".join(path.relative_to(self.root).with_suffix("").parts).removesuffix(".__init__")

    def imported(self, path: Path) -> set[str]:
        """Dotted names of the modules that a file imports, anywhere in it."""
        package = path.relative_to(self.root).parent.parts
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                above = package[:len(package) - node.level + 1] if node.level else ()
                base = ".".join((*above, *filter(None, [node.module])))
                names |= {name if (name := f"{base}.{alias.name}") in self.modules else base for alias in node.names}
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("find_spec"):
                names.add(ast.literal_eval(node.args[0]))          # looked up for its files instead of imported for its code
        return names

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """Module -> everything that its file imports."""
        return {module: self.imported(path) for module, path in self.modules.items()}

    @cached_property
    def arrows(self) -> dict[str, set[str]]:
        """Module -> the modules of hpcfl that its file imports; the package itself left out."""
        return {module: {name for name in names if name in self.modules and "." in name} - {module} for module, names in self.imports.items()}

    def reach(self, start: str) -> set[str]:
        """All modules that come along with one."""
        return reach(self.arrows, start)

    def circles(self) -> list[tuple[str, str]]:
        """The arrows that lie on a circle of files."""
        behind = {module: self.reach(module) for module in self.arrows}
        return sorted((module, other) for module, others in self.arrows.items() for other in others if module in behind[other])

    def rooms(self) -> dict[str, set[str]]:
        """Room -> the other rooms that its files import."""
        found: dict[str, set[str]] = {}
        for module, others in self.arrows.items():
            if "." in module:
                found.setdefault(room_of(module), set()).update(map(room_of, others))
        return {room: others - {room} for room, others in found.items()}

    def floors(self) -> list[set[str]]:
        """The rooms from the ground up: each lies above all that it imports, those of a circle on one floor."""
        rooms = self.rooms()
        behind = {room: reach(rooms, room) for room in rooms}
        circles = {room: frozenset({room, *(other for other in behind[room] if room in behind[other])}) for room in rooms}

        @cache
        def climb(circle: frozenset[str]) -> int:
            return 1 + max((climb(circles[other]) for room in circle for other in rooms[room] - circle), default=0)
        floors = {room: climb(circle) for room, circle in circles.items()}
        return [{room for room in rooms if floors[room] == number} for number in range(1, max(floors.values()) + 1)]

    def draw(self) -> str:
        """The drawing, the highest floor first."""
        rooms, floors = self.rooms(), self.floors()
        sizes = {room: sum(room_of(module) == room for module in self.modules if "." in module) for room in rooms}
        lines = [f"{number:>3}  " + "  ".join(f"{room} ({sizes[room]})" if sizes[room] > 1 else room for room in sorted(names))
                 for number, names in reversed(list(enumerate(floors, start=1)))]
        return "\n".join([*lines, f"{sum(sizes.values())} modules in {len(rooms)} rooms on {len(floors)} floors, {sum(map(len, rooms.values()))} arrows "
                                  f"between rooms, {len(self.circles())} arrows of files on circles"])


def room_of(module: str) -> str:
    """The package below hpcfl that a module lies in, or the module itself; empty for hpcfl."""
    return module.partition(".")[2].partition(".")[0]


def reach(arrows: dict[str, set[str]], start: str) -> set[str]:
    """Everything that arrows lead to from one place, in one step or more."""
    found: set[str] = set()
    todo = [start]
    while todo:
        new = arrows[todo.pop()] - found
        found |= new
        todo += new
    return found


if __name__ == "__main__":
    print(House(Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY).draw())
