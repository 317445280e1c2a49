"""multi_lora: y += s_i B_i A_i x for rows that each have an adapter of their own, ranks mixed."""
