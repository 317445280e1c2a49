
struct cache {   /* of one attention: what it keeps, room for S tokens of each sequence, its angles; of a
                    recurrence its states, as keys */
  void *keys, *values;
  long S;
  const float *cosines, *sines;
};

struct program {
  const struct team *team;
  long members, M, wanted_rows, capacity, own_bytes;
  const long *token, *slot, *position, *wanted;
  float *logits;
  long *chosen;   /* token of each wanted row; null where nobody asks */
  float *best;    /* of each part of each wanted row, and where it stands */
  long *where;
  char *arena, *own;
  const void *const *tensors;
  const struct cache *caches;
};


static void part_0(const struct program *a, int member, int members, const void *const *w,
                   const struct cache *cache) {
  const long M = a->M, few = M <= 2;
  const long r0 = few ? 0 : M * member / members, r1 = few ? M : M * (member + 1) / members;
  const long s0 = M * member / members, s1 = M * (member + 1) / members;
  char *const mine = a->own + member * a->own_bytes;
  char *const shared = a->arena, *const rows = few ? mine : shared;
  const long capacity = a->capacity, row_capacity = few ? 2 : capacity;
  /* embed: embedding */
    embed_0e631fd8a5148e83(a->token, a->position, w[0], NULL, NULL, (void *)(shared + 0 * capacity), 32, s0, s1);
}


static void part_1(const struct program *a, int member, int members, const void *const *w,
                   const struct cache *cache) {
  const long M = a->M, few = M <= 2;
  const long r0 = few ? 0 : M * member / members, r1 = few ? M : M * (member + 1) / members;
  const long s0 = M * member / members, s1 = M * (member + 1) / members;
  char *const mine = a->own + member * a->own_bytes;
  char *const shared = a->arena, *const rows = few ? mine : shared;
  const long capacity = a->capacity, row_capacity = few ? 2 : capacity;
  a->team->meet(members);
  /* norm: layer.norm1 */
    norm_c0034369f6753cd6((void *)(shared + 0 * capacity), w[0], NULL, (void *)(rows + 128 * row_capacity), 32, r0, r1);
  /* quantize: layer.attention.q, layer.attention.k, layer.attention.v */
    quantize((void *)(rows + 128 * row_capacity), 16, r0 * 2, r1 * 2, (void *)(rows + 256 * row_capacity), (void *)(rows + 320 * row_capacity), (void *)(rows + 384 * row_capacity));
  if (!few) a->team->meet(members);
  /* quant_linear: layer.attention.q, layer.attention.k, layer.attention.v */
  { const long i0 = (1) * member / members,
      i1 = (1) * (member + 1) / members;
    quant_linear_170f9d40b8c646fa((void *)(rows + 256 * row_capacity), (void *)(rows + 320 * row_capacity), (void *)(rows + 384 * row_capacity), w[1], (void *)(shared + 448 * capacity), M, 64, 32, i0, i1);
  }
  a->team->meet(members);
  /* write_cache: layer.attention */
  { const long i0 = (M * 2) * member / members,
      i1 = (M * 2) * (member + 1) / members;
    write_cache_5b8b822d069922d9((const float *)(void *)(shared + 448 * capacity) + 0, (const float *)(void *)(shared + 448 * capacity) + 32, (const float *)(void *)(shared + 448 * capacity) + 48, 64, 64, 64, a->slot, a->position, a->position,
      cache[0].cosines, cache[0].sines, NULL, NULL, cache[0].keys, cache[0].values,
      (void *)(shared + 128 * capacity), M, cache[0].S, i0, i1);
  }
  a->team->meet(members);
  /* attend: layer.attention */
  { const long i0 = (M * 2) * member / members,
      i1 = (M * 2) * (member + 1) / members;
    attend_5b8b822d069922d9((void *)(shared + 128 * capacity), cache[0].keys, cache[0].values, a->slot, a->position,
      (void *)(shared + 256 * capacity), M, cache[0].S, i0, i1);
  }
  a->team->meet(members);
  /* quantize: layer.attention.o */
    quantize((void *)(shared + 256 * capacity), 16, r0 * 2, r1 * 2, (void *)(rows + 128 * row_capacity), (void *)(rows + 192 * row_capacity), (void *)(rows + 384 * row_capacity));
  if (!few) a->team->meet(members);
  /* quant_linear: layer.attention.o */
  { const long i0 = (1) * member / members,
      i1 = (1) * (member + 1) / members;
    quant_linear_45cdcb5d9eb15477((void *)(rows + 128 * row_capacity), (void *)(rows + 192 * row_capacity), (void *)(rows + 384 * row_capacity), w[2], (void *)(shared + 0 * capacity), (void *)(shared + 0 * capacity), M, 32, 32, i0, i1);
  }
  a->team->meet(members);
  /* norm: layer.norm2 */
    norm_c0034369f6753cd6((void *)(shared + 0 * capacity), w[3], NULL, (void *)(rows + 128 * row_capacity), 32, r0, r1);
  /* quantize: layer.mlp.gate, layer.mlp.up */
    quantize((void *)(rows + 128 * row_capacity), 16, r0 * 2, r1 * 2, (void *)(rows + 256 * row_capacity), (void *)(rows + 320 * row_capacity), (void *)(rows + 384 * row_capacity));
  if (!few) a->team->meet(members);
  /* quant_linear: layer.mlp.gate, layer.mlp.up */
  { const long i0 = (2) * member / members,
      i1 = (2) * (member + 1) / members;
    quant_linear_a4be6621cf7ee0ed((void *)(rows + 256 * row_capacity), (void *)(rows + 320 * row_capacity), (void *)(rows + 384 * row_capacity), w[4], (void *)(shared + 448 * capacity), M, 48, 32, i0, i1);
  }
  a->team->meet(members);
  /* quantize: layer.mlp.down */
    quantize((void *)(shared + 448 * capacity), 16, r0 * 3, r1 * 3, (void *)(rows + 128 * row_capacity), (void *)(rows + 192 * row_capacity), (void *)(rows + 256 * row_capacity));
  if (!few) a->team->meet(members);
  /* quant_linear: layer.mlp.down */
  { const long i0 = (1) * member / members,
      i1 = (1) * (member + 1) / members;
    quant_linear_45cdcb5d9eb15477((void *)(rows + 128 * row_capacity), (void *)(rows + 192 * row_capacity), (void *)(rows + 256 * row_capacity), w[5], (void *)(shared + 0 * capacity), (void *)(shared + 0 * capacity), M, 32, 48, i0, i1);
  }
}


static void part_2(const struct program *a, int member, int members, const void *const *w,
                   const struct cache *cache) {
  const long M = a->M, few = M <= 2;
  const long r0 = few ? 0 : M * member / members, r1 = few ? M : M * (member + 1) / members;
  const long s0 = M * member / members, s1 = M * (member + 1) / members;
  char *const mine = a->own + member * a->own_bytes;
  char *const shared = a->arena, *const rows = few ? mine : shared;
  const long capacity = a->capacity, row_capacity = few ? 2 : capacity;
  a->team->meet(members);
  /* norm: layer.norm1 */
    norm_c0034369f6753cd6((void *)(shared + 0 * capacity), w[0], NULL, (void *)(rows + 128 * row_capacity), 32, r0, r1);
  /* quantize: layer.attention.q, layer.attention.k, layer.attention.v */
    quantize((void *)(rows + 128 * row_capacity), 16, r0 * 2, r1 * 2, (void *)(rows + 256 * row_capacity), (void *)(rows + 320 * row_capacity), (void *)(rows + 384 * row_capacity));
  if (!few) a->team->meet(members);
  /* quant_linear: layer.attention.q, layer.attention.k, layer.attention.v */
  { const long i0 = (1) * member / members,
      i1 = (1) * (member + 1) / members;
    quant_linear_ffc2e4a877a31c34((void *)(rows + 256 * row_capacity), (void *)(rows + 320 * row_capacity), (void *)(rows + 384 * row_capacity), w[1], (void *)(shared + 448 * capacity), M, 64, 32, i0, i1);
  }
  a->team->meet(members);
  /* write_cache: layer.attention */
  { const long i0 = (M * 2) * member / members,
      i1 = (M * 2) * (member + 1) / members;
    write_cache_5b8b822d069922d9((const float *)(void *)(shared + 448 * capacity) + 0, (const float *)(void *)(shared + 448 * capacity) + 32, (const float *)(void *)(shared + 448 * capacity) + 48, 64, 64, 64, a->slot, a->position, a->position,
      cache[0].cosines, cache[0].sines, NULL, NULL, cache[0].keys, cache[0].values,
      (void *)(shared + 128 * capacity), M, cache[0].S, i0, i1);
  }
  a->team->meet(members);
  /* attend: layer.attention */
  { const long i0 = (M * 2) * member / members,
      i1 = (M * 2) * (member + 1) / members;
    attend_5b8b822d069922d9((void *)(shared + 128 * capacity), cache[0].keys, cache[0].values, a->slot, a->position,
      (void *)(shared + 256 * capacity), M, cache[0].S, i0, i1);
  }
  a->team->meet(members);
  /* quantize: layer.attention.o */
    quantize((void *)(shared + 256 * capacity), 16, r0 * 2, r1 * 2, (void *)(rows + 128 * row_capacity), (void *)(rows + 192 * row_capacity), (void *)(rows + 384 * row_capacity));
  if (!few) a->team->meet(members);
  /* quant_linear: layer.attention.o */
  { const long i0 = (1) * member / members,
      i1 = (1) * (member + 1) / members;
    quant_linear_0e724480174d4d3f((void *)(rows + 128 * row_capacity), (void *)(rows + 192 * row_capacity), (void *)(rows + 384 * row_capacity), w[2], (void *)(shared + 0 * capacity), (void *)(shared + 0 * capacity), M, 32, 32, i0, i1);
  }
  a->team->meet(members);
  /* norm: layer.norm2 */
    norm_c0034369f6753cd6((void *)(shared + 0 * capacity), w[3], NULL, (void *)(rows + 128 * row_capacity), 32, r0, r1);
  /* quantize: layer.mlp.gate, layer.mlp.up */
    quantize((void *)(rows + 128 * row_capacity), 16, r0 * 2, r1 * 2, (void *)(rows + 256 * row_capacity), (void *)(rows + 320 * row_capacity), (void *)(rows + 384 * row_capacity));
  if (!few) a->team->meet(members);
  /* quant_linear: layer.mlp.gate, layer.mlp.up */
  { const long i0 = (2) * member / members,
      i1 = (2) * (member + 1) / members;
    quant_linear_29de8e56a7794a05((void *)(rows + 256 * row_capacity), (void *)(rows + 320 * row_capacity), (void *)(rows + 384 * row_capacity), w[4], (void *)(shared + 448 * capacity), M, 48, 32, i0, i1);
  }
  a->team->meet(members);
  /* quantize: layer.mlp.down */
    quantize((void *)(shared + 448 * capacity), 16, r0 * 3, r1 * 3, (void *)(rows + 128 * row_capacity), (void *)(rows + 192 * row_capacity), (void *)(rows + 256 * row_capacity));
  if (!few) a->team->meet(members);
  /* quant_linear: layer.mlp.down */
  { const long i0 = (1) * member / members,
      i1 = (1) * (member + 1) / members;
    quant_linear_0e724480174d4d3f((void *)(rows + 128 * row_capacity), (void *)(rows + 192 * row_capacity), (void *)(rows + 256 * row_capacity), w[5], (void *)(shared + 0 * capacity), (void *)(shared + 0 * capacity), M, 32, 48, i0, i1);
  }
}


static void part_3(const struct program *a, int member, int members, const void *const *w,
                   const struct cache *cache) {
  const long M = a->wanted_rows, few = M <= 2;
  const long r0 = few ? 0 : M * member / members, r1 = few ? M : M * (member + 1) / members;
  const long s0 = M * member / members, s1 = M * (member + 1) / members;
  char *const mine = a->own + member * a->own_bytes;
  char *const shared = a->arena, *const rows = few ? mine : shared;
  const long capacity = a->capacity, row_capacity = few ? 2 : capacity;
  a->team->meet(members);
  /* gather:  */
    for (long m = r0; m < r1; m++) memcpy((float *)(void *)(rows + 128 * row_capacity) + m * 32, (const float *)(void *)(shared + 0 * capacity) + a->wanted[m] * 32, 128);
  if (!few) a->team->meet(members);
  /* norm: norm */
    norm_c0034369f6753cd6((void *)(rows + 128 * row_capacity), w[0], NULL, (void *)(rows + 0 * row_capacity), 32, r0, r1);
  if (!few) a->team->meet(members);
  /* quantize: embedding */
    quantize((void *)(rows + 0 * row_capacity), 16, r0 * 2, r1 * 2, (void *)(rows + 128 * row_capacity), (void *)(rows + 192 * row_capacity), (void *)(rows + 256 * row_capacity));
  if (!few) a->team->meet(members);
  /* quant_linear: embedding */
  { const long i0 = (1) * member / members,
      i1 = (1) * (member + 1) / members;
    quant_linear_170f9d40b8c646fa((void *)(rows + 128 * row_capacity), (void *)(rows + 192 * row_capacity), (void *)(rows + 256 * row_capacity), w[1], a->logits, M, 61, 32, i0, i1);
  }
}


static void work(void *given, int member, int members) {
  const struct program *a = given;
  for (long i = 0; i < 1; i++) part_0(a, member, members, a->tensors + 0 + i * 1, a->caches + 0 + i * 0);
  for (long i = 0; i < 1; i++) part_1(a, member, members, a->tensors + 1 + i * 6, a->caches + 0 + i * 1);
  for (long i = 0; i < 2; i++) part_2(a, member, members, a->tensors + 7 + i * 6, a->caches + 1 + i * 1);
  for (long i = 0; i < 1; i++) part_3(a, member, members, a->tensors + 19 + i * 2, a->caches + 3 + i * 0);
  if (a->chosen) {
    const long parts = members < 61L ? members : 61L, W = a->wanted_rows, items = W * parts;
    a->team->meet(members);
    choose_parts_bc4158d96fbe01dd(a->logits, 61L, parts, a->best, a->where,
                 items * member / members, items * (member + 1) / members);
    a->team->meet(members);
    choose_token_bc4158d96fbe01dd(a->best, a->where, parts, a->chosen,
                 W * member / members, W * (member + 1) / members);
  }
}

void program(struct program *a) { a->team->run(work, a, (int)a->members); }
long arena_bytes(long capacity) { return 704 * capacity; }
long own_bytes(void) { return 1408; }
