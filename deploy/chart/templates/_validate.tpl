{{/* Values that the schema cannot refuse with a text that helps. */}}
{{- define "nmi.validate" -}}
{{- if .Values.mic }}{{ fail "mic: this chart does not install MIC, and in managed mode there is none. In standard mode keep aad-pod-identity's MIC. Remove the value; docs/migrating.md says more" }}{{ end -}}
{{- if contains "aad-pod-identity" .Values.image.repository }}{{ fail (printf "image.repository: %s has images of aad-pod-identity, and not of this agent. Set it to where yours is, and remove nmi.tag; docs/migrating.md says more" .Values.image.repository) }}{{ end -}}
{{- if and (regexMatch "^v1[.][12]?[0-9]([.]|$)" .Capabilities.KubeVersion.Version) (or .Values.startupTaint .Values.admissionPolicies.warnings .Values.admissionPolicies.exceptions (kindIs "map" .Values.admissionPolicies.allowedIdentities)) }}{{ fail (printf "startupTaint and admissionPolicies need Kubernetes 1.30 or later (ValidatingAdmissionPolicy); this cluster has %s" .Capabilities.KubeVersion.Version) }}{{ end -}}
{{- range $label := list "app.kubernetes.io/name" "app.kubernetes.io/instance" }}{{ if hasKey $.Values.nmi.podLabels $label }}{{ fail (printf "nmi.podLabels: the chart gives %s itself. Remove the label" $label) }}{{ end }}{{ end -}}
{{- if and (eq .Values.federation.rights "node") (regexMatch "^v1[.]([12]?[0-9]|3[0-5])([.]|$)" .Capabilities.KubeVersion.Version) }}{{ fail (printf "federation.rights=node needs Kubernetes 1.36 or later (constrained impersonation); this cluster has %s. Use namespaces" .Capabilities.KubeVersion.Version) }}{{ end -}}
{{- if and .Values.federation.namespaces (ne .Values.federation.rights "namespaces") }}{{ fail "federation.namespaces counts with federation.rights=namespaces only" }}{{ end -}}
{{- if and (eq .Values.federation.rights "namespaces") (not .Values.federation.namespaces) }}{{ fail "federation.rights=namespaces needs federation.namespaces: the namespaces whose pods get tokens by federation" }}{{ end -}}
{{- with .Values.federation }}{{ if and (or .tokenProxySNI .tokenProxyCA) (not .tokenProxy) }}{{ fail "federation.tokenProxySNI and federation.tokenProxyCA are of no use without federation.tokenProxy" }}{{ end }}{{ end -}}
{{- if and .Values.federation.tokenProxy (eq .Values.federation.audience "api://AzureADTokenExchange") }}{{ fail "federation.tokenProxy: the proxy does not accept tokens for Entra. Set federation.audience=api://AKSIdentityBinding" }}{{ end -}}
{{- if .Values.adminsecret }}{{ fail "adminsecret: it is MIC's, which this chart does not install. Remove the value" }}{{ end -}}
{{- if .Values.rbac.allowAccessToSecrets }}{{ fail "rbac.allowAccessToSecrets: the agent is not given all secrets of the cluster. Name those of service principals in rbac.secrets, as {<namespace>: [<name>]}" }}{{ end -}}
{{- if .Values.rbac.pspEnabled }}{{ fail "rbac.pspEnabled: Kubernetes has no PodSecurityPolicies since 1.25. Remove the value" }}{{ end -}}
{{- if eq (toString .Values.installCRDs) "true" }}{{ fail "installCRDs: Helm installs the definitions of this chart where they are missing, and leaves those that are there as they are. Remove the value. If a release of aad-pod-identity made yours with it, uninstalling that deletes them and every identity: read docs/migrating.md first" }}{{ end -}}
{{- if (.Values.podMonitor).enabled }}{{ fail "podMonitor: the agent's pods declare no ports that a PodMonitor could name. Set serviceMonitor.enabled instead" }}{{ end -}}
{{- include "nmi.validateExtraArgs" . }}
{{- include "nmi.validatePorts" . }}
{{- /* That is Parse in cmd/nmi/startuptaint. */}}
{{- $label := "[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?" }}
{{- $domain := "[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*" }}
{{- if and .Values.startupTaint (not (regexMatch (printf "^(%s/)?%s(=(%s)?)?:(NoSchedule|NoExecute)$" $domain $label $label) .Values.startupTaint)) }}{{ fail (printf "startupTaint: %q is not a taint that keeps pods off: want <key>[=<value>]:NoSchedule or <key>[=<value>]:NoExecute, such as startup-taint.cluster-autoscaler.kubernetes.io/nmi-not-ready=true:NoSchedule" .Values.startupTaint) }}{{ end -}}
{{- if and (eq .Values.nmi.hostNetworkPods "bound") (not (has .Values.nmi.redirectMode (list "auto" "ebpf"))) }}{{ fail "nmi.hostNetworkPods=bound needs nmi.redirectMode=ebpf: rules do not see pods on the host network" }}{{ end -}}
{{- if and .Values.cilium.localRedirectPolicy (ne .Values.nmi.redirectMode "none") }}{{ fail "cilium.localRedirectPolicy needs nmi.redirectMode=none: Cilium redirects then, and not the agent" }}{{ end -}}
{{- end -}}

{{/* A flag of extraArgs that the chart writes from a value would win over the value, without what else
the value does: the rights of a startup taint, the Service's port. */}}
{{- define "nmi.validateExtraArgs" -}}
{{- $values := dict
  "node" "nothing: it is the pod's node"
  "operation-mode" "operationMode"
  "forceNamespaced" "forceNamespaced"
  "custom-user-agent" "customUserAgent"
  "startup-taint" "startupTaint"
  "boot-guard-dir" "bootGuard"
  "federation" "federation.serviceAccounts"
  "federation-as-node" "federation.rights"
  "federation-tenant-id" "federation.tenantID"
  "federation-authority" "federation.authority"
  "federation-audience" "federation.audience"
  "federation-token-proxy" "federation.tokenProxy"
  "federation-token-proxy-sni" "federation.tokenProxySNI"
  "MICNamespace" "nmi.micNamespace"
  "http-probe-port" "nmi.probePort"
  "prometheus-port" "nmi.prometheusPort"
  "host-token-uids" "nmi.hostTokenUIDs"
  "redirect-mode" "nmi.redirectMode"
  "host-network-pods" "nmi.hostNetworkPods"
  "ipt-update-interval-sec" "nmi.ipTableUpdateTimeIntervalInSeconds"
  "block-instance-metadata" "nmi.blockInstanceMetadata"
  "metadata-header-required" "nmi.metadataHeaderRequired"
  "allow-network-plugin-kubenet" "nmi.allowNetworkPluginKubenet"
  "log-format" "nmi.loggingFormat"
  "v" "nmi.logVerbosity" }}
{{- range .Values.nmi.extraArgs }}
{{- $flag := regexReplaceAll "^--?([^=]*).*$" . "${1}" }}
{{- if regexMatch "^-v[0-9]+$" . }}{{ $flag = "v" }}{{ end }}
{{- with get $values $flag }}{{ fail (printf "nmi.extraArgs: --%s has a value of its own in this chart. Set %s instead" $flag .) }}{{ end }}
{{- end }}
{{- end -}}

{{- define "nmi.validatePorts" -}}
{{- $ports := dict "nmi.probePort" (toString (.Values.nmi.probePort | default 8085)) "nmi.prometheusPort" (toString (.Values.nmi.prometheusPort | default 9090)) }}
{{- $used := dict "2579" "the agent's own port (--nmi-port)" }}
{{- range .Values.nmi.extraArgs }}
{{- if hasPrefix "--nmi-port=" . }}{{ $used = dict (trimPrefix "--nmi-port=" .) "--nmi-port in nmi.extraArgs" }}{{ end }}
{{- end }}
{{- range $name, $port := $ports }}
{{- with get $used $port }}{{ fail (printf "%s and %s are both %s: choose different ports" $name . $port) }}{{ end }}
{{- $_ := set $used $port $name }}
{{- end }}
{{- end -}}
