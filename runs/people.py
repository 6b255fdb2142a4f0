"""Sessions of people of the hidden world, as a log of real ones would come: picks and comparisons, no utility. What they truly are goes to a file of its own.

    python runs/people.py out/people --seed=0 --num_users=600 --num_sessions=4      -> sessions.jsonl  sessions.npz  sessions.truth.jsonl
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sessions  # noqa: E402
from data import slate  # noqa: E402
from data.embeddings import save_embeddings  # noqa: E402


def main(out, seed, num_users, num_sessions, world_types, deviation, critique):
    world = slate.World(seed, num_types=world_types, deviation=deviation)
    found = sessions.world_log(world, seed, num_users=num_users, num_sessions=num_sessions, critique=critique)
    Path(out).mkdir(parents=True, exist_ok=True)
    save_embeddings(f"{out}/sessions.npz", found.ids, found.emb, world.name, False)
    slate.write_truth(f"{out}/sessions.truth.jsonl", found.log, found.kind, found.utility.reshape(-1, found.utility.shape[2]))
    slate.write(found.log, f"{out}/sessions.jsonl")
    print(json.dumps(dict(out=str(out), sessions=len(found.log.user), people=num_users, utility=round(float(found.picked.mean()), 4))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    for name, default in (("seed", 0), ("num_users", 600), ("num_sessions", 4), ("world_types", 4), ("deviation", .2), ("critique", .1)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    main(**vars(parser.parse_args()))
