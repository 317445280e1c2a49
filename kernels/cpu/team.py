"""The team of threads that C kernels share: one small library, loaded once for the process.

A kernel is handed the team and gives it work: every member calls the same function with its own number.
Between the phases of one piece of work members meet at a barrier, so a whole decoding step enters and leaves
the team once. Members wait by spinning for some 50 microseconds and sleep after that; whoever waits longer
yields its core, so more members than free cores are slow but never stuck. After a fork the child starts a
team of its own.
"""

from __future__ import annotations

TEAM_HEADER = r"""
typedef void (*work_t)(void *arguments, int member, int members);
struct team {
  void (*run)(work_t work, void *arguments, int members);   /* returns when every member has */
  void (*meet)(int members);                                /* barrier inside work */
};
"""

TEAM = (
    r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>
#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() ((void)0)
#endif
"""
    + TEAM_HEADER
    + r"""
enum { MOST = 64, SPINS = 2000, PATIENCE = 20000 };

static struct {
  pthread_mutex_t turn, sleep;      /* one piece of work at a time; what sleepers wait under */
  pthread_cond_t wake;
  atomic_uint round;                /* rises with every piece of work */
  atomic_int left;                  /* members still at work */
  atomic_int asleep;
  atomic_int arrived;               /* at the barrier */
  atomic_uint met;                  /* rises when all have arrived */
  work_t work;
  void *arguments;
  int members, started;
  pid_t owner;
} the = {.turn = PTHREAD_MUTEX_INITIALIZER, .sleep = PTHREAD_MUTEX_INITIALIZER,
         .wake = PTHREAD_COND_INITIALIZER};

static void rest(int spins) {
  if (spins % SPINS) PAUSE(); else sched_yield();
}

static void meet(int members) {
  if (members < 2) return;
  unsigned before = atomic_load(&the.met);
  if (atomic_fetch_add(&the.arrived, 1) + 1 == members) {
    atomic_store(&the.arrived, 0);
    atomic_fetch_add(&the.met, 1);
  } else {
    for (int i = 1; atomic_load_explicit(&the.met, memory_order_acquire) == before; i++) rest(i);
  }
}

static void *member(void *given) {
  int me = (int)((uint64_t)given & 0xff);
  unsigned seen = (unsigned)((uint64_t)given >> 8);   /* the round before the one it was started for */
  for (;;) {
    int spins = 1;
    while (spins < PATIENCE && atomic_load_explicit(&the.round, memory_order_acquire) == seen) rest(spins++);
    if (atomic_load(&the.round) == seen) {
      pthread_mutex_lock(&the.sleep);
      atomic_fetch_add(&the.asleep, 1);
      while (atomic_load(&the.round) == seen) pthread_cond_wait(&the.wake, &the.sleep);
      atomic_fetch_sub(&the.asleep, 1);
      pthread_mutex_unlock(&the.sleep);
    }
    seen = atomic_load(&the.round);
    if (me < the.members) the.work(the.arguments, me, the.members);
    atomic_fetch_sub(&the.left, 1);
  }
  return NULL;
}

/* every member that was ever started takes part in every round, if only to say that it has seen it */
static void run(work_t work, void *arguments, int members) {
  if (members > MOST) members = MOST;
  pthread_mutex_lock(&the.turn);
  if (the.owner != getpid()) {
    the.owner = getpid();
    the.started = 0;
    atomic_store(&the.round, 0);
    atomic_store(&the.asleep, 0);
    atomic_store(&the.arrived, 0);
    pthread_mutex_init(&the.sleep, NULL);
    pthread_cond_init(&the.wake, NULL);
  }
  for (pthread_t thread; the.started < members - 1; the.started++) {
    uint64_t given = (uint64_t)atomic_load(&the.round) << 8 | (uint64_t)(the.started + 1);
    if (pthread_create(&thread, NULL, member, (void *)given)) { members = the.started + 1; break; }
    pthread_detach(thread);
  }
  if (members < 2) {
    work(arguments, 0, 1);
  } else {
    the.work = work;
    the.arguments = arguments;
    the.members = members;
    atomic_store(&the.left, the.started);
    atomic_fetch_add(&the.round, 1);
    if (atomic_load(&the.asleep)) {
      pthread_mutex_lock(&the.sleep);
      pthread_cond_broadcast(&the.wake);
      pthread_mutex_unlock(&the.sleep);
    }
    work(arguments, 0, members);
    for (int i = 1; atomic_load_explicit(&the.left, memory_order_acquire); i++) rest(i);
  }
  pthread_mutex_unlock(&the.turn);
}

const struct team effc_team = {run, meet};
"""
)
