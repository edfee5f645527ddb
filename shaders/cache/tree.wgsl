{#- The mask among the new tokens of a sequence: a word for each, of which bit j says whether it sees new token j. Twin of Tree in
    src/problem/tree.rs.
    Needs: params.wgsl; `tree_mask`. Declares: tree_depth, key_position, tree_visible. -#}

// New tokens that a new token sees besides itself, which is its position among them.
fn tree_depth(sees: u32, token: u32) -> i32 {
  return i32(countOneBits(sees & ~(1u << token) & ((1u << params.queries) - 1u)));
}

// The position of the key at a place. `tree` is the first word of the sequence, `offset` the place of its first new token.
fn key_position(place: u32, tree: u32, offset: i32) -> i32 {
  let token = i32(place) - offset;
  if (token < 0 || token >= i32(params.queries)) { return i32(place); }
  return offset + tree_depth(tree_mask[tree + u32(token)], u32(token));
}

// Whether a query at a position, with this word, sees a key.
fn tree_visible(position: i32, sees: u32, place: u32, keys: u32, tree: u32, offset: i32) -> bool {
  let token = i32(place) - offset;
  if (place >= keys || (token >= 0 && ((sees >> u32(token)) & 1u) == 0u)) { return false; }
  let key = key_position(place, tree, offset);
  return key <= position + params.right && (key >= position - params.left || key < i32(params.sink_tokens));
}
