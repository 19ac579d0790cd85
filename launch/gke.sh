#!/bin/sh
# TPU slices of a GKE cluster, as a JobSet (launch/gke/jobset.yaml).
#
#   sh launch/gke.sh --name=emo --image=REGISTRY/emo_jax:TAG --bucket=BUCKET --accelerator=tpu-v6e-slice --topology=8x8 \
#       --config=configs/emo_1b14b.py --workdir=/bucket/emo [--slices=1] [--chips=4] [--spot] [--service_account=default]
#       [--dry_run]      (prints the manifest)
#
# Needs kubectl with the cluster's credentials, JobSet and the Cloud Storage FUSE driver in the cluster, node pools of
# that accelerator and topology with so many chips a node, an image of launch/Dockerfile, and a bucket with hierarchical
# namespace that the service account may write. `kubectl logs -f jobs/emo-slice-0` shows the training, `kubectl delete
# jobset emo` saves and ends it.

# shellcheck disable=SC2034 # the manifest reads these
set -eu
here=$(dirname "$0") options='name= image= bucket= accelerator= topology= slices= chips= service_account= spot'
name='' image='' bucket='' accelerator='' topology='' slices=1 chips=4 service_account=default spot=''
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"
needs_run
needs kubectl 'install it and run gcloud container clusters get-credentials'
for option in name image bucket accelerator topology; do
    eval "value=\$$option"
    [ -n "$value" ] || die "--$option=VALUE is missing (--help says what it is)."
done
case $workdir in /bucket/?*) ;; *) die "--workdir=$workdir must lie in the bucket: --workdir=/bucket/FOLDER." ;; esac
case $topology in *[!0-9x]* | x* | *x | *xx*) die "--topology=$topology must be like 8x8 or 4x4x4." ;; esac
case $slices$chips in *[!0-9]*) die '--slices and --chips are numbers.' ;; esac
nodes=$(($(echo "$topology" | sed 's/x/ * /g') / chips))
[ "$nodes" -gt 0 ] || die "--topology=$topology has fewer than the $chips chips of a node: add --chips=NUMBER."

# The words as strings of JSON, in which Kubernetes would replace $(VAR).
json() {
    # shellcheck disable=SC2016
    for word; do printf '%s' "$word" | sed 's/[\\"]/\\&/g; s/\$(/$$(/g; s/^/"/; s/$/", /'; done | tr -d '\n' | sed 's/, $//'
}
arguments=$(json --distributed "$@" --preempted_status=75)
cache=$(json "$workdir/compiled")
if [ -n "$spot" ]; then spot='
                cloud.google.com/gke-spot: "true"'; fi

# The file holds no backquotes, and nothing in it but these variables starts with a dollar.
manifest=$(eval "cat <<END_OF_MANIFEST
$(cat launch/gke/jobset.yaml)
END_OF_MANIFEST")
if [ -n "$dry_run" ]; then
    printf '# kubectl apply -f - <<END\n%s\n# END\n' "$manifest"
else
    printf '%s\n' "$manifest" | kubectl apply -f -
fi
