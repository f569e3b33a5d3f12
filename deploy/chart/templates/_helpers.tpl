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
app.kubernetes.io/instance: {{ .Release.Name | toYaml }}
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
# iptables insists on user ID 0; root has these capabilities here, and no others.
runAsUser: 0
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
  add: [NET_ADMIN, NET_RAW{{ if include "nmi.bpf" . }}, BPF{{ end }}]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- /* Whether the agent may attach the programs of mode ebpf. Cleanup unpins them, which takes no capability. */}}
{{- define "nmi.bpf" -}}
{{- if and (has .Values.nmi.redirectMode (list "auto" "ebpf")) (not .Values.cleanup) }}true{{ end -}}
{{- end -}}

{{- define "nmi.bpfMount" -}}
# Programs are pinned here, and stay when the agent ends. AppArmor forbids that in the container's /sys/fs.
- name: bpf
  mountPath: /host/sys/fs/bpf
{{- end }}

{{- define "nmi.bpfVolume" -}}
- name: bpf
  hostPath:
    path: /sys/fs/bpf
{{- end }}

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
