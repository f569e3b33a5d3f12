package iptables

import "context"

// Check does one check of the rules, as Run does.
func (r *Reconciler) Check(ctx context.Context) (changed bool, err error) {
	return r.reconcile(ctx, &Status{Mode: r.cfg.Mode})
}
