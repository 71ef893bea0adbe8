{{- define "midspan.name" -}}
{{- $name := default .Release.Name .Values.fullnameOverride -}}
{{- /* Pods' names are names of edges, which are one DNS label; the longest suffix is -control-headless. */ -}}
{{- $name | replace "." "-" | trunc 45 | trimSuffix "-" -}}
{{- end -}}

{{- /* Labels of what belongs to .component. */ -}}
{{- define "midspan.labels" -}}
{{ include "midspan.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "midspan.selector" -}}
app.kubernetes.io/name: midspan
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{- define "midspan.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ default $.Chart.AppVersion .tag }}{{ end -}}
{{- end -}}
{{- end -}}

{{- /* The name of a Service inside the cluster, with the port when it is not the usual one. */ -}}
{{- define "midspan.serviceHost" -}}
{{- $usual := ternary 443 80 .root.Values.tls.enabled -}}
{{- $port := int (get .root.Values .component).service.port -}}
{{- include "midspan.name" .root }}-{{ .component }}.{{ .root.Release.Namespace }}.svc{{ if ne $port $usual }}:{{ $port }}{{ end -}}
{{- end -}}

{{- /* What devices and services dial: the HostName of connection strings. */ -}}
{{- define "midspan.host" -}}
{{- .Values.publicHost | default (include "midspan.serviceHost" (dict "root" . "component" "control")) -}}
{{- end -}}

{{- define "midspan.edgeUrl" -}}
{{- if .Values.edgeUrl -}}
{{- .Values.edgeUrl -}}
{{- else if .Values.publicHost -}}
https://{{ .Values.publicHost }}
{{- else -}}
{{ ternary "https" "http" .Values.tls.enabled }}://{{ include "midspan.serviceHost" (dict "root" . "component" "edge") }}
{{- end -}}
{{- end -}}

{{- /* The host of the edge's URL; a wildcard where it holds the owner. */ -}}
{{- define "midspan.edgeHost" -}}
{{- (urlParse (include "midspan.edgeUrl" . | replace "{owner}" "owner-placeholder")).host | replace "owner-placeholder" "*" | splitList ":" | first -}}
{{- end -}}

{{- /* The domain of the edges' own names, or nothing. */ -}}
{{- define "midspan.ownerDomain" -}}
{{- if contains "{owner}" .Values.edgeUrl }}{{ include "midspan.edgeHost" . | trimPrefix "*." }}{{ end -}}
{{- end -}}

{{- /* Whether clients speak TLS with whatever stands in front. */ -}}
{{- define "midspan.publicTls" -}}
{{- if or .Values.tls.enabled .Values.ingress.enabled .Values.gateway.enabled (hasPrefix "https:" .Values.edgeUrl) }}yes{{ end -}}
{{- end -}}

{{- /* Whether the chart makes the public certificate. */ -}}
{{- define "midspan.ownCertificate" -}}
{{- if and .Values.tls.enabled (not (or .Values.tls.existingSecret .Values.tls.certManager.issuer)) }}yes{{ end -}}
{{- end -}}

{{- /* The Secrets with the certificates of the public and of the internal ports. */ -}}
{{- define "midspan.tlsSecret" -}}
{{- .Values.tls.existingSecret | default (printf "%s-tls" (include "midspan.name" .)) -}}
{{- end -}}

{{- define "midspan.internalSecret" -}}
{{- (get .root.Values.internalTls .component).existingSecret | default (printf "%s-internal-%s" (include "midspan.name" .root) .component) -}}
{{- end -}}

{{- /* An address to listen on at every interface, and the pod's own. */ -}}
{{- define "midspan.any" -}}{{ ternary "[::]" "0.0.0.0" .Values.ipv6 }}{{- end -}}
{{- define "midspan.podIp" -}}{{ ternary "[$(POD_IP)]" "$(POD_IP)" .Values.ipv6 }}{{- end -}}

{{- define "midspan.podSecurity" -}}
runAsNonRoot: true
{{- with .Values.userId }}
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "midspan.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "midspan.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{- /* Values that fit together by themselves, but not with each other. */ -}}
{{- define "midspan.check" -}}
{{- with .Values -}}
{{- if and .redis.enabled .redis.url -}}
{{- fail "redis.url is for a Redis of your own: set redis.enabled=false with it" -}}
{{- end -}}
{{- if not (or .redis.enabled .redis.url) -}}
{{- fail "redis.enabled=false needs redis.url: control planes and edges meet in a Redis" -}}
{{- end -}}
{{- if and .redis.cluster .redis.sentinelMaster -}}
{{- fail "redis.cluster and redis.sentinelMaster exclude each other" -}}
{{- end -}}
{{- if and .redis.enabled (or .redis.cluster .redis.sentinelMaster .redis.username .redis.caKey .redis.sentinelPasswordKey) -}}
{{- fail "redis.cluster, sentinelMaster, username, caKey and sentinelPasswordKey are for a Redis of your own: set redis.enabled=false and redis.url" -}}
{{- end -}}
{{- if and (or .redis.caKey .redis.sentinelPasswordKey) (not .redis.existingSecret) -}}
{{- fail "redis.caKey and redis.sentinelPasswordKey name keys of redis.existingSecret: set that too" -}}
{{- end -}}
{{- if and (or .ingress.enabled .gateway.enabled) (not .publicHost) -}}
{{- fail "an Ingress or a Gateway needs publicHost: the name that devices and services dial" -}}
{{- end -}}
{{- if and .ingress.enabled .gateway.enabled -}}
{{- fail "ingress.enabled and gateway.enabled exclude each other" -}}
{{- end -}}
{{- if and .publicHost (not .edgeUrl) (not (or .ingress.enabled .gateway.enabled)) -}}
{{- fail "publicHost needs edgeUrl: one host for control plane and edge needs ingress.enabled or gateway.enabled, and Services alone need a name for each (edgeUrl=https://streams.example)" -}}
{{- end -}}
{{- if and .edgeUrl (not .publicHost) -}}
{{- fail "edgeUrl needs publicHost: the name that devices and services dial" -}}
{{- end -}}
{{- if and .gateway.enabled (not .gateway.parentRefs) -}}
{{- fail "gateway.enabled needs gateway.parentRefs: the Gateways that take the routes" -}}
{{- end -}}
{{- if and .gateway.enabled (eq .gateway.mode "passthrough") -}}
{{- if not .tls.enabled -}}
{{- fail "gateway.mode=passthrough needs tls.enabled: TLS ends at the pods" -}}
{{- end -}}
{{- if eq (include "midspan.edgeHost" $) .publicHost -}}
{{- fail "gateway.mode=passthrough needs an edgeUrl with another host than publicHost: TLS that is passed through has no path" -}}
{{- end -}}
{{- end -}}
{{- if and .tls.existingSecret .tls.certManager.issuer -}}
{{- fail "tls.existingSecret and tls.certManager.issuer exclude each other" -}}
{{- end -}}
{{- if and .internalTls.certManager.issuer (or .internalTls.control.existingSecret .internalTls.edge.existingSecret) -}}
{{- fail "internalTls.certManager.issuer and the existing Secrets of internalTls exclude each other" -}}
{{- end -}}
{{- if ne (empty .internalTls.control.existingSecret) (empty .internalTls.edge.existingSecret) -}}
{{- fail "internalTls.control.existingSecret and internalTls.edge.existingSecret belong together" -}}
{{- end -}}
{{- if and (contains "{owner}" .edgeUrl) (not .tls.enabled) -}}
{{- fail "an edgeUrl with {owner} needs tls.enabled: edges tell by the name in the TLS handshake whose a connection is" -}}
{{- end -}}
{{- if and .serviceMonitor.enabled .networkPolicy.enabled (not .networkPolicy.metricsFrom) -}}
{{- fail "serviceMonitor.enabled needs networkPolicy.metricsFrom: who may read the metrics" -}}
{{- end -}}
{{- range $role := list "control" "edge" -}}
{{- with (get $.Values $role).autoscaling -}}
{{- if and .enabled (lt (int .maxReplicas) (int .minReplicas)) -}}
{{- fail (printf "%s.autoscaling.maxReplicas is less than minReplicas" $role) -}}
{{- end -}}
{{- if and .enabled (not (or .cpu .streams .metrics)) -}}
{{- fail (printf "%s.autoscaling has no metric: set cpu or metrics" $role) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Names in the public certificate. */ -}}
{{- define "midspan.publicNames" -}}
{{- $names := list -}}
{{- with .Values.publicHost }}{{ $names = list . }}{{ end -}}
{{- if .Values.publicHost }}{{ $names = append $names (include "midspan.edgeHost" .) }}{{ end -}}
{{- if include "midspan.ownCertificate" . -}}
{{- range $role := list "control" "edge" -}}
{{- $service := printf "%s-%s" (include "midspan.name" $) $role -}}
{{- $names = concat $names (list $service (printf "%s.%s" $service $.Release.Namespace) (printf "%s.%s.svc" $service $.Release.Namespace) (printf "%s.%s.svc.cluster.local" $service $.Release.Namespace)) -}}
{{- end -}}
{{- $names = append $names "localhost" -}}
{{- else if not .Values.publicHost -}}
{{- range $role := list "control" "edge" -}}
{{- $names = append $names (printf "%s-%s.%s.svc" (include "midspan.name" $) $role $.Release.Namespace) -}}
{{- end -}}
{{- end -}}
{{- $names | uniq | toJson -}}
{{- end -}}

{{- define "midspan.peer" -}}
- podSelector:
    matchLabels:
      {{- include "midspan.selector" . | nindent 6 }}
{{- end -}}

{{- define "midspan.dns" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end -}}

{{- define "midspan.toRedis" -}}
- ports:
    {{- if .Values.redis.enabled }}
    - {port: 6379, protocol: TCP}
  to:
    {{- include "midspan.peer" (dict "root" . "component" "redis") | nindent 4 }}
    {{- else }}
    {{- $ports := .Values.networkPolicy.redisPorts }}
    {{- if not $ports }}
    {{- range splitList "," .Values.redis.url }}
    {{- $ports = append $ports (regexFind ":[0-9]+$" (urlParse (trim .)).host | trimPrefix ":" | default "6379" | int) }}
    {{- end }}
    {{- if .Values.redis.sentinelMaster }}{{ $ports = append $ports 6379 }}{{ end }}
    {{- end }}
    {{- range uniq $ports }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
  {{- with .Values.networkPolicy.redisTo }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
    {{- end }}
{{- end -}}

{{- /* A stream lasts as long as its ends want. */ -}}
{{- define "midspan.noTimeouts" -}}
timeouts: {request: 0s, backendRequest: 0s}
{{- end -}}

{{- define "midspan.testContainer" -}}
image: {{ include "midspan.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
command: [/usr/local/bin/midspan]
args:
  {{- if .ca }}
  - --ca=/etc/midspan/ca/ca.crt
  {{- end }}
  {{- if not (include "midspan.publicTls" .root) }}
  - --insecure-plaintext
  {{- end }}
  {{- range .args }}
  - {{ . }}
  {{- end }}
resources:
  requests: {cpu: 10m, memory: 32Mi, ephemeral-storage: 16Mi}
  limits: {memory: 64Mi, ephemeral-storage: 16Mi}
securityContext:
  {{- include "midspan.containerSecurity" . | nindent 2 }}
volumeMounts:
  - {name: connections, mountPath: /etc/midspan/connections, readOnly: true}
  {{- if .ca }}
  - {name: ca, mountPath: /etc/midspan/ca, readOnly: true}
  {{- end }}
{{- end -}}

{{- /* Whether there is anything to test with. */ -}}
{{- define "midspan.test" -}}
{{- if and .Values.test.enabled (or .Values.test.existingSecret (not .Values.credentials.existingSecret)) }}yes{{ end -}}
{{- end -}}
