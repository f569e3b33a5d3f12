// Package tokencache turns keys into tokens, from memory where it can.
//
// The life of a token here:
//
//  1. Get looks the key up. A fresh token is returned at once.
//  2. On a miss the negative cache is asked whether the key's last fetch has just
//     failed; if not, the caller joins the call for the key, or starts one. However many
//     callers wait, the upstream is asked once.
//  3. Fetch waits for its slot at the upstream, asks, and what it brings is stored. A call
//     belongs to no caller: it goes on when all of them have left, unless there are too
//     many such calls.
//  4. From half of its life on a token is due: it is still served, and the refresher
//     replaces it in the background. It does so without any request, too, as long as a
//     caller that was given the token is still there.
//  5. In its last five minutes a token is expiring: callers wait for its refresh, for a
//     second at most, and are given the old token if it fails.
//  6. A refresh that fails leaves the token in memory and is tried again with
//     exponential backoff. An expired token is never served, by whichever clock.
//  7. Failed fetches of keys without a token are remembered for seconds in the negative
//     cache, which has its own bound.
//  8. The least recently used token is evicted when the cache is full.
//
// One mutex guards all of it. Tokens are immutable once stored. Keys hold no secret and
// may be logged.
package tokencache
