"""A team whose members take turns, so that a missing barrier shows every time and not now and then.

One member at a time works, from one barrier to the next, then the one after it. What it reads before others
have written it, or writes before others have read it, gives another result in one of the two orders. A
barrier can also be passed over, which tells whether the work needs it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from effc.kernels.cpu.build import build, load
from effc.kernels.cpu.isa import Isa
from effc.kernels.cpu.team import TEAM_HEADER

TURNS = (
    r"""
#include <pthread.h>
"""
    + TEAM_HEADER
    + r"""
enum { MOST = 64 };

static struct {
  pthread_mutex_t lock;
  pthread_cond_t next;
  work_t work;
  void *arguments;
  int members, turn, backwards, done[MOST];
  long met[MOST], without;     /* barriers that each member has come to; the one that is passed over */
} the = {.lock = PTHREAD_MUTEX_INITIALIZER, .next = PTHREAD_COND_INITIALIZER};

static void hand_on(void) {
  for (int i = 0; i < the.members; i++) {
    the.turn = (the.turn + 1) % the.members;
    if (!the.done[the.turn]) break;
  }
  pthread_cond_broadcast(&the.next);
}

static void meet(int members) {
  if (members < 2) return;
  const int me = the.turn;       /* nobody else is at work */
  if (the.met[me]++ == the.without) return;
  pthread_mutex_lock(&the.lock);
  hand_on();
  while (the.turn != me) pthread_cond_wait(&the.next, &the.lock);
  pthread_mutex_unlock(&the.lock);
}

static void *member(void *given) {
  const int me = (int)(long)given;
  pthread_mutex_lock(&the.lock);
  while (the.turn != me) pthread_cond_wait(&the.next, &the.lock);
  pthread_mutex_unlock(&the.lock);
  the.work(the.arguments, the.backwards ? the.members - 1 - me : me, the.members);
  pthread_mutex_lock(&the.lock);
  the.done[me] = 1;
  hand_on();
  pthread_mutex_unlock(&the.lock);
  return 0;
}

static void run(work_t work, void *arguments, int members) {
  pthread_t threads[MOST];
  if (members > MOST) members = MOST;
  the.work = work;
  the.arguments = arguments;
  the.members = members;
  the.turn = 0;
  for (int i = 0; i < members; i++) the.met[i] = the.done[i] = 0;
  for (long i = 0; i < members; i++) pthread_create(threads + i, 0, member, (void *)i);
  for (int i = 0; i < members; i++) pthread_join(threads[i], 0);
}

void order(int backwards, long without) { the.backwards = backwards; the.without = without; }
long barriers(void) { return the.met[0]; }
const struct team turns = {run, meet};
"""
)


@contextmanager
def turns(isa: Isa, backwards: bool = False, without: int = -1) -> Iterator[int]:
    """The address of a team that takes turns; its barrier number `without` is not kept."""
    library = load(build(TURNS, isa))
    library.order.argtypes = [ctypes.c_int, ctypes.c_long]
    library.order(int(backwards), without)
    yield ctypes.addressof(ctypes.c_char.in_dll(library, "turns"))


def barriers(isa: Isa) -> int:
    """How many barriers each member came to in the last work."""
    library = load(build(TURNS, isa))
    library.barriers.restype = ctypes.c_long
    return int(library.barriers())
