// Package tokencache turns keys into tokens, from memory where it can.
//
// The life of a token here:
//
//  1. Get looks for the key. A fresh token is returned at once.
//  2. On a miss, or when the token has expired, the caller joins the key's
//     flight: however many callers wait, the upstream is asked once.
//  3. The flight looks again (another may just have landed), fetches under a
//     context and a deadline of its own, and stores what it got.
//  4. Past its refresh point a token is due: it is still served, and the first
//     caller to notice sends off one flight behind its back.
//  5. A refresh that fails leaves the token where it is and is tried again
//     after a pause. An expired token is never served.
//  6. The least recently used token leaves when the cache is full.
//
// A flight belongs to no caller: one that goes away fails nobody else.
// Tokens are immutable once stored, keys hold no secret and may be logged.
package tokencache
