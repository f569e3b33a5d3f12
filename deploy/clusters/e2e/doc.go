// Package e2e proves what the agent promises on real clusters.
package e2e
