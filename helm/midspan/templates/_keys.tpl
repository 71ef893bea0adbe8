{{- /*
The keys that the chart makes, as a JSON object of plain texts. They are made once and then read back from their Secret, so
that no upgrade changes one. A chart that is only rendered can read nothing back, and must not make keys at every turn.
All templates share one answer, kept beside the values.
*/ -}}
{{- define "midspan.keys" -}}
{{- if not (hasKey .Values "_keys") -}}
{{- $keys := dict -}}
{{- $missing := false -}}
{{- $found := (lookup "v1" "Secret" .Release.Namespace (printf "%s-keys" (include "midspan.name" .))).data | default dict -}}
{{- range $key, $value := $found }}{{ $_ := set $keys $key (b64dec $value) }}{{ end -}}
{{- if and (not .Values.ticketKey.existingSecret) (not (hasKey $keys "ticket.key")) -}}
{{- $missing = true -}}
{{- $_ := set $keys "ticket.key" (include "midspan.randomKey" .) -}}
{{- end -}}
{{- if and (not .Values.credentials.existingSecret) (not (hasKey $keys "credentials.json")) -}}
{{- $missing = true -}}
{{- $group := include "midspan.randomKey" . -}}
{{- $device := dict "id" "helm-test" "keys" (list (include "midspan.randomKey" .)) -}}
{{- $tester := dict "keys" (list (include "midspan.randomKey" .)) "allow" (list "open") "devices" (list "helm-test") -}}
{{- $operator := dict "keys" (list (include "midspan.randomKey" .)) "allow" (list "open" "list" "close") "every_device" true -}}
{{- $credentials := dict "group_keys" (list $group) "devices" list "services" (dict "operator" $operator) -}}
{{- if .Values.test.enabled -}}
{{- $_ := set $credentials "devices" (list $device) -}}
{{- $_ := set $credentials.services "helm-test" $tester -}}
{{- end -}}
{{- $_ := set $keys "credentials.json" (toPrettyJson $credentials) -}}
{{- end -}}
{{- if and (include "midspan.ownCertificate" .) (not (hasKey $keys "ca.key")) -}}
{{- $missing = true -}}
{{- $ca := genCAWithKey (printf "%s CA" (include "midspan.name" .)) 3650 (genPrivateKey "ecdsa") -}}
{{- $_ := set $keys "ca.crt" $ca.Cert -}}
{{- $_ := set $keys "ca.key" $ca.Key -}}
{{- end -}}
{{- if and (not .Values.internalTls.control.existingSecret) (not .Values.internalTls.certManager.issuer) (not (hasKey $keys "internal-ca.key")) -}}
{{- $missing = true -}}
{{- $ca := genCAWithKey (printf "%s internal CA" (include "midspan.name" .)) 3650 (genPrivateKey "ecdsa") -}}
{{- $_ := set $keys "internal-ca.crt" $ca.Cert -}}
{{- $_ := set $keys "internal-ca.key" $ca.Key -}}
{{- end -}}
{{- if and .Values.redis.enabled (not .Values.redis.existingSecret) (not (hasKey $keys "redis.password")) -}}
{{- $missing = true -}}
{{- $_ := set $keys "redis.password" (randAlphaNum 32) -}}
{{- end -}}
{{- if $missing }}{{ include "midspan.onACluster" . }}{{ end -}}
{{- $_ := set .Values "_keys" (dict "keys" $keys "made" $missing) -}}
{{- end -}}
{{- toJson .Values._keys.keys -}}
{{- end -}}

{{- /* 32 random bytes in base64. */ -}}
{{- define "midspan.randomKey" -}}{{ randBytes 32 }}{{- end -}}

{{- /* Fails where there is no cluster to read from: a list has a kind even when it is empty. */ -}}
{{- define "midspan.onACluster" -}}
{{- if not (lookup "v1" "ServiceAccount" .Release.Namespace "") -}}
{{- fail (printf `

The chart is only rendered here (helm template, --dry-run=client, Argo CD), so it cannot see the keys that it has made before, and would
make others at every turn. Use helm install (a look before: --dry-run=server), or give it Secrets of your own:
%s
helm/midspan/README.md ("Without helm install") has the commands that make them.` (include "midspan.wantedSecrets" .)) -}}
{{- end -}}
{{- end -}}

{{- define "midspan.wantedSecrets" -}}
{{- with .Values -}}
{{- if not .ticketKey.existingSecret }}  ticketKey.existingSecret (ticket.key)
{{ end -}}
{{- if not .credentials.existingSecret }}  credentials.existingSecret (credentials.json)
{{ end -}}
{{- if include "midspan.ownCertificate" $ }}  tls.existingSecret (tls.crt, tls.key), or tls.certManager.issuer
{{ end -}}
{{- if and (not .internalTls.control.existingSecret) (not .internalTls.certManager.issuer) }}  internalTls.control.existingSecret and internalTls.edge.existingSecret (ca.crt, tls.crt, tls.key), or internalTls.certManager.issuer
{{ end -}}
{{- if and .redis.enabled (not .redis.existingSecret) }}  redis.existingSecret (password, redis.conf), or redis.enabled=false and redis.url
{{ end -}}
{{- end -}}
{{- end -}}

{{- /* A certificate of one of the chart's own CAs for .names, good for servers and clients; .ca is the start of the CA's keys. */ -}}
{{- define "midspan.certificate" -}}
{{- $keys := include "midspan.keys" .root | fromJson -}}
{{- $ca := buildCustomCert (get $keys (printf "%s.crt" .ca) | b64enc) (get $keys (printf "%s.key" .ca) | b64enc) -}}
{{- $made := genSignedCertWithKey (first .names) nil .names 3650 $ca (genPrivateKey "ecdsa") -}}
ca.crt: {{ get $keys (printf "%s.crt" .ca) | b64enc }}
tls.crt: {{ $made.Cert | b64enc }}
tls.key: {{ $made.Key | b64enc }}
{{- end -}}
