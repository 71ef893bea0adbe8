use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use kube::{ResourceExt as _, runtime::watcher::Event};

/// What Kubernetes says of the edges' pods.
///
/// It takes edges out of the choice, earlier and for more reasons than leases do. Who is gone, only leases say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pods {
    pub(super) named: BTreeMap<String, Pod>,
    pub(super) current: bool,
}

/// One pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pod {
    pub(super) address: String,
    pub(super) zone: Option<String>,
    pub(super) ready: bool,
    pub(super) terminating: bool,
}

impl Pods {
    /// A current view: the pods by name, whether each is ready, and whether it is terminating.
    pub fn current(pods: impl IntoIterator<Item = (String, (bool, bool))>) -> Self {
        let pod = |(ready, terminating)| Pod { address: String::new(), zone: None, ready, terminating };
        Self {
            named: pods.into_iter().map(|(name, conditions)| (name, pod(conditions))).collect(),
            current: true,
        }
    }

    /// Whether an edge whose lease is alive may be given new streams. An edge has the name of its pod.
    ///
    /// | the pod is | in a current view | in one that is out of date, or before the first |
    /// |---|---|---|
    /// | ready | yes | yes |
    /// | not ready | no | yes: it may have become ready since, and its lease says that it runs |
    /// | terminating | no | no: that is never taken back |
    /// | not there | no: it has gone, or is not ready yet | yes: it may have come since |
    pub fn may_take(&self, edge: &str) -> bool {
        match self.named.get(edge) {
            Some(pod) => !pod.terminating && (pod.ready || !self.current),
            None => !self.current,
        }
    }
}

/// The slices of one Service, as a watch tells of them.
#[derive(Debug, Default)]
pub(super) struct Slices {
    held: HashMap<String, Vec<(String, Pod)>>,
    /// Those of a list that is not whole yet.
    coming: Option<HashMap<String, Vec<(String, Pod)>>>,
}

/// More slices or endpoints than any relay has.
#[derive(Debug, thiserror::Error)]
#[error("more than {MOST} slices and endpoints")]
pub(super) struct TooMany;

/// The most slices and endpoints, counted together.
const MOST: usize = 10_000;

impl Slices {
    /// Takes in what the watch tells. Says whether all is told for now, which it is not within a list.
    pub(super) fn apply(&mut self, event: Event<EndpointSlice>) -> Result<bool, TooMany> {
        match event {
            Event::Init => self.coming = Some(HashMap::new()),
            Event::InitApply(slice) => hold(self.coming.get_or_insert_default(), slice)?,
            Event::InitDone => self.held = self.coming.take().unwrap_or_default(),
            Event::Apply(slice) => hold(&mut self.held, slice)?,
            Event::Delete(slice) => {
                self.held.remove(&slice.name_any());
            }
        }
        Ok(self.coming.is_none())
    }

    /// The pods of all slices. Where several speak of one pod, as with two families of addresses, the worst counts: one of
    /// them has not been brought up to date yet.
    pub(super) fn pods(&self) -> BTreeMap<String, Pod> {
        let mut pods = BTreeMap::<String, Pod>::new();
        let mut slices: Vec<_> = self.held.iter().collect();
        slices.sort_unstable_by_key(|&(name, _)| name);
        for (name, pod) in slices.into_iter().flat_map(|(_, pods)| pods) {
            pods.entry(name.clone())
                .and_modify(|known| {
                    known.ready &= pod.ready;
                    known.terminating |= pod.terminating;
                })
                .or_insert_with(|| pod.clone());
        }
        pods
    }
}

fn hold(slices: &mut HashMap<String, Vec<(String, Pod)>>, slice: EndpointSlice) -> Result<(), TooMany> {
    let name = slice.name_any();
    let pods: Vec<_> = slice.endpoints.into_iter().filter_map(pod).collect();
    let others = slices.iter().filter(|(other, _)| **other != name);
    let count: usize = others.map(|(_, pods)| 1 + pods.len()).sum();
    if count + 1 + pods.len() > MOST {
        return Err(TooMany);
    }
    slices.insert(name, pods);
    Ok(())
}

/// A pod and its name. `None` for an endpoint that is none.
fn pod(endpoint: Endpoint) -> Option<(String, Pod)> {
    let target = endpoint.target_ref.filter(|target| target.kind.as_deref() == Some("Pod"))?;
    let conditions = endpoint.conditions.unwrap_or_default();
    // What is missing means ready. A Service may publish pods that are not ready as if they were; `serving` tells.
    let ready = conditions.ready.unwrap_or(true);
    let pod = Pod {
        address: endpoint.addresses.into_iter().next().unwrap_or_default(),
        zone: endpoint.zone,
        ready: ready && conditions.serving.unwrap_or(ready),
        terminating: conditions.terminating.unwrap_or(false),
    };
    Some((target.name?, pod))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_view_takes_edges_out_of_the_choice_while_it_is_current() {
        let pod = |ready, terminating| Pod { address: String::new(), zone: None, ready, terminating };
        let named = BTreeMap::from([
            ("ready".to_owned(), pod(true, false)),
            ("not ready".to_owned(), pod(false, false)),
            ("terminating".to_owned(), pod(false, true)),
            ("terminating, published as ready".to_owned(), pod(true, true)),
        ]);
        let current = Pods { named: named.clone(), current: true };
        let old = Pods { named, current: false };
        for (name, in_current, in_old) in [
            ("ready", true, true),
            ("not ready", false, true),
            ("terminating", false, false),
            ("terminating, published as ready", false, false),
            ("not there", false, true),
        ] {
            assert_eq!((current.may_take(name), old.may_take(name)), (in_current, in_old), "{name}");
            assert!(Pods::default().may_take(name), "{name}");
        }
    }

    #[test]
    fn conditions_mean_what_the_api_says() {
        let cases = [
            (json!({}), (true, false)),
            (json!({ "ready": null, "serving": null, "terminating": null }), (true, false)),
            (json!({ "ready": true, "serving": true, "terminating": false }), (true, false)),
            (json!({ "ready": false }), (false, false)),
            (json!({ "ready": false, "serving": true, "terminating": true }), (false, true)),
            (json!({ "ready": false, "serving": false, "terminating": true }), (false, true)),
            // With publishNotReadyAddresses, `ready` is always true.
            (json!({ "ready": true, "serving": false, "terminating": false }), (false, false)),
            (json!({ "ready": true, "serving": true, "terminating": true }), (true, true)),
        ];
        for (conditions, (ready, terminating)) in cases {
            let pods = pods_of([slice("a", &[("edge-0", conditions.clone())])]);
            let pod = &pods["edge-0"];
            assert_eq!((pod.ready, pod.terminating), (ready, terminating), "{conditions}");
        }
        let bare = json!({ "metadata": { "name": "a" }, "addressType": "IPv4", "endpoints": [
            { "addresses": ["10.0.0.1"], "targetRef": { "kind": "Pod", "name": "edge-0" }, "zone": "north" },
            { "addresses": ["10.0.0.2"], "targetRef": { "kind": "Node", "name": "node-0" } },
            { "addresses": ["10.0.0.3"] },
        ]});
        let pods = pods_of([serde_json::from_value(bare).unwrap()]);
        let only = Pod {
            address: "10.0.0.1".to_owned(),
            zone: Some("north".to_owned()),
            ready: true,
            terminating: false,
        };
        assert_eq!(pods, BTreeMap::from([("edge-0".to_owned(), only)]));
    }

    #[test]
    fn of_one_pod_in_several_slices_the_worst_counts() {
        let (ready, leaving) = (json!({ "ready": true }), json!({ "ready": false, "terminating": true }));
        for order in [[&ready, &leaving], [&leaving, &ready]] {
            let [a, b] = order.map(Clone::clone);
            let pods = pods_of([
                slice("a", &[("edge-0", a), ("edge-1", ready.clone())]),
                slice("b", &[("edge-0", b)]),
            ]);
            assert_eq!((pods["edge-0"].ready, pods["edge-0"].terminating), (false, true));
            assert!(pods["edge-1"].ready);
        }
    }

    #[test]
    fn a_list_counts_once_it_is_whole_and_then_takes_the_place_of_all_before() {
        let mut slices = Slices::default();
        let ready = || json!({ "ready": true });
        let known = |slices: &Slices| slices.pods().into_keys().collect::<Vec<_>>();
        assert!(!slices.apply(Event::Init).unwrap());
        assert!(!slices.apply(Event::InitApply(slice("a", &[("edge-0", ready())]))).unwrap());
        assert!(known(&slices).is_empty());
        assert!(slices.apply(Event::InitDone).unwrap());
        assert!(slices.apply(Event::Apply(slice("b", &[("edge-1", ready())]))).unwrap());
        assert_eq!(known(&slices), ["edge-0", "edge-1"]);
        // A list that breaks off changes nothing, nor does one that begins.
        assert!(!slices.apply(Event::Init).unwrap());
        assert!(!slices.apply(Event::InitApply(slice("c", &[("edge-2", ready())]))).unwrap());
        assert!(!slices.apply(Event::Init).unwrap());
        assert_eq!(known(&slices), ["edge-0", "edge-1"]);
        assert!(!slices.apply(Event::InitApply(slice("b", &[("edge-1", ready())]))).unwrap());
        assert!(slices.apply(Event::InitDone).unwrap());
        assert_eq!(known(&slices), ["edge-1"]);
        assert!(slices.apply(Event::Delete(slice("b", &[]))).unwrap());
        assert!(known(&slices).is_empty());
    }

    #[test]
    fn nobody_fills_the_memory_with_endpoints() {
        let mut slices = Slices::default();
        let endpoints: Vec<_> = (0..MOST / 2).map(|n| (format!("edge-{n}"), json!({}))).collect();
        let endpoints: Vec<_> = endpoints.iter().map(|(name, it)| (name.as_str(), it.clone())).collect();
        assert!(slices.apply(Event::Apply(slice("a", &endpoints))).is_ok());
        // The same again takes the place of what was there.
        assert!(slices.apply(Event::Apply(slice("a", &endpoints))).is_ok());
        assert!(slices.apply(Event::Apply(slice("b", &endpoints))).is_err());
        assert_eq!(slices.pods().len(), MOST / 2);
    }

    fn pods_of<const N: usize>(slices: [EndpointSlice; N]) -> BTreeMap<String, Pod> {
        let mut all = Slices::default();
        for slice in slices {
            assert!(all.apply(Event::Apply(slice)).unwrap());
        }
        all.pods()
    }

    fn slice(name: &str, endpoints: &[(&str, serde_json::Value)]) -> EndpointSlice {
        let endpoints = endpoints.iter().map(|(pod, conditions)| {
            json!({ "addresses": ["10.0.0.1"], "conditions": conditions, "targetRef": { "kind": "Pod", "name": pod } })
        });
        serde_json::from_value(json!({
            "metadata": { "name": name },
            "addressType": "IPv4",
            "endpoints": endpoints.collect::<Vec<_>>(),
        }))
        .unwrap()
    }
}
