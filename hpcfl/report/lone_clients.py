"""lone_clients: what to say of a run in which some clients, or all of them, average with nobody."""
from collections.abc import Mapping

NAMED = 6                                                          # parts that a warning lists; of more it says how many


def warning_text(method: str, found: Mapping[str, int]) -> str | None:
    """What a user must know of parts of models that one client averages with nobody; None where there is none. found: part -> clients that average it."""
    alone = [name for name, clients in found.items() if clients == 1]
    if not alone:
        return None
    names = ", ".join(alone[:NAMED]) + (f" and {len(alone) - NAMED} more" if len(alone) > NAMED else "")
    if len(alone) == len(found):
        return f"{method} averages nothing here: it averages models of one architecture, and each architecture has one client only ({names}); where the " \
               "method exchanges nothing else, this is local training. Clients of one architecture (models.names) would average"
    return f"{method} averages models of one architecture, and these have one client only, which averages with nobody: {names}"
