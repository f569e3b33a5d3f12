{{- define "nmi.name" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name -}}
{{- end -}}
{{- end -}}

{{- define "nmi.labels" -}}
app.kubernetes.io/name: nmi
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* The selector of aad-pod-identity's managed-mode manifest, whose DaemonSet this one replaces. */}}
{{- define "nmi.selector" -}}
component: nmi
tier: node
{{- end -}}

{{- define "nmi.image" -}}
{{- printf "%s/%s:%s" .Values.image.repository .Values.nmi.image (default .Chart.AppVersion .Values.nmi.tag) -}}
{{- with .Values.nmi.digest }}@{{ . }}{{ end -}}
{{- end -}}

{{- define "nmi.securityContext" -}}
# iptables insists on user ID 0; root has these two capabilities here,
# and no others.
runAsUser: 0
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
  add: [NET_ADMIN, NET_RAW]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Values that the schema cannot refuse with a text that helps. */}}
{{- define "nmi.validate" -}}
{{- if .Values.mic }}{{ fail "mic: this chart does not install MIC, and in managed mode there is none. In standard mode keep aad-pod-identity's MIC. Remove the value; docs/migrating.md says more" }}{{ end -}}
{{- if contains "aad-pod-identity" .Values.image.repository }}{{ fail (printf "image.repository: %s has images of aad-pod-identity, and not of this agent. Set it to where yours is, and remove nmi.tag; docs/migrating.md says more" .Values.image.repository) }}{{ end -}}
{{- if and (regexMatch "^v1[.][12]?[0-9]([.]|$)" .Capabilities.KubeVersion.Version) (or .Values.startupTaint .Values.admissionPolicies.warnings .Values.admissionPolicies.exceptions .Values.admissionPolicies.allowedIdentities) }}{{ fail (printf "startupTaint and admissionPolicies need Kubernetes 1.30 or later (ValidatingAdmissionPolicy); this cluster has %s" .Capabilities.KubeVersion.Version) }}{{ end -}}
{{- if .Values.adminsecret }}{{ fail "adminsecret: it is MIC's, which this chart does not install. Remove the value" }}{{ end -}}
{{- if .Values.rbac.allowAccessToSecrets }}{{ fail "rbac.allowAccessToSecrets: the agent is not given all secrets of the cluster. Name those of service principals in rbac.secrets, as {<namespace>: [<name>]}" }}{{ end -}}
{{- if .Values.rbac.pspEnabled }}{{ fail "rbac.pspEnabled: Kubernetes has no PodSecurityPolicies since 1.25. Remove the value" }}{{ end -}}
{{- /* That is Parse in cmd/nmi/startuptaint. */}}
{{- $label := "[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?" }}
{{- $domain := "[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*" }}
{{- if and .Values.startupTaint (not (regexMatch (printf "^(%s/)?%s(=(%s)?)?:(NoSchedule|NoExecute)$" $domain $label $label) .Values.startupTaint)) }}{{ fail (printf "startupTaint: %q is not a taint that keeps pods off: want <key>[=<value>]:NoSchedule or <key>[=<value>]:NoExecute, such as startup-taint.cluster-autoscaler.kubernetes.io/nmi-not-ready=true:NoSchedule" .Values.startupTaint) }}{{ end -}}
{{- if and .Values.cilium.localRedirectPolicy (ne .Values.nmi.redirectMode "none") }}{{ fail "cilium.localRedirectPolicy needs nmi.redirectMode=none: Cilium redirects then, and not the agent" }}{{ end -}}
{{- end -}}

{{- /* The node's units, for the boot guard. Without a type the pod starts on a node that has none. */}}
{{- define "nmi.bootGuardMount" -}}
- name: systemd-units
  mountPath: /host/etc/systemd/system
{{- end }}

{{- define "nmi.bootGuardVolume" -}}
- name: systemd-units
  hostPath:
    path: /etc/systemd/system
{{- end }}
