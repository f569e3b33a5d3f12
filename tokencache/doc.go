// Package tokencache turns keys into tokens, from memory where it can.
//
// The life of a token here:
//
//  1. Get looks for the key. A fresh token is returned at once, and no lock taken.
//  2. On a miss the caller joins the key's flight: however many callers wait, the
//     upstream is asked once. A flight that nobody waits for any more ends; a renewal
//     and a refresh do not.
//  3. The flight looks again (another may just have landed), waits for its turn at
//     the upstream, fetches under a context and a deadline of its own, and stores
//     what it got. Turns go round between the callers who wait.
//  4. From half of its life on a token is due: it is still served, and the refresher
//     fetches another behind everybody's back. It does so too when nobody asks, as
//     long as a caller who was given the token is still there.
//  5. In its last five minutes a token is urgent: who asks waits for the refresh, but
//     a second at most, and is given the old token if it fails.
//  6. A refresh that fails leaves the token where it is and is tried again later and
//     later. An expired token is never served, by whichever clock.
//  7. Failures of keys that have no token are remembered briefly, apart from tokens.
//  8. The least recently used token leaves when the cache is full.
//
// A flight belongs to no caller: one that goes away fails nobody else.
// Tokens are immutable once stored, keys hold no secret and may be logged.
package tokencache
