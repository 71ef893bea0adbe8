//! `GET /v1/devices` and `GET /v1/devices/{device}`: who is connected.

use std::collections::BTreeMap;

use http::StatusCode;
use midspan_core::{
    api::{DevicePage, DeviceStatus, PAGE_MAX},
    credential::{Credentials, Permission, ServiceIdentity},
    id::DeviceAddress,
    path::PageQuery,
    problem::{Problem, ProblemKind},
};
use midspan_platform::{
    clock,
    http::{HttpRequest, HttpResponse, json},
    rendezvous::{LinkRecord, ServerRole},
};

use super::{bad_request, in_time, not_known_yet};
use crate::{
    auth::out_of_scope,
    control::Control,
    view::{Presence, View},
};

impl Control {
    pub(crate) async fn list_devices(&self, request: &HttpRequest) -> Result<HttpResponse, Problem> {
        let service = self.service_that_may(request, Permission::List)?;
        let page = PageQuery::parse(request.uri().query().unwrap_or_default())?;
        let after = page.after.map(|after| after.parse::<DeviceAddress>()).transpose();
        let after = after.map_err(|error| bad_request(format!("after: {error}")))?;

        let credentials = self.credentials.current();
        let mut links = self.linked(&service, after.clone(), page.limit + 1).await?;
        let registered = credentials.registered(after.as_ref()).filter(|address| service.reaches(address));
        for address in registered.take(page.limit + 1) {
            links.entry(address.clone()).or_insert(None);
        }
        let more = links.len() > page.limit;
        let statuses = links.into_iter().take(page.limit);
        let view = self.look().await?;
        let statuses = statuses.map(|(address, link)| self.status(&view, &credentials, address, link));
        let items = statuses.collect::<Result<Vec<_>, _>>()?;
        let next = items.last().filter(|_| more).map(|last| last.address.to_string());
        Ok(json(StatusCode::OK, &DevicePage { items, next }))
    }

    pub(crate) async fn device_status(
        &self,
        request: &HttpRequest,
        address: &DeviceAddress,
    ) -> Result<HttpResponse, Problem> {
        let service = self.service_that_may(request, Permission::List)?;
        if !service.reaches(address) {
            return Err(out_of_scope(&service, address));
        }
        let credentials = self.credentials.current();
        if !credentials.knows(address) {
            let detail = format!("device {address} is not registered with this relay");
            return Err(Problem::new(ProblemKind::DeviceUnknown, detail));
        }
        let link = in_time(self.rendezvous.link(address)).await?;
        let view = self.look().await?;
        Ok(json(StatusCode::OK, &self.status(&view, &credentials, address.clone(), link)?))
    }

    /// A device as it is shown. A replica that is gone has no devices.
    fn status(
        &self,
        view: &View,
        credentials: &Credentials,
        address: DeviceAddress,
        link: Option<LinkRecord>,
    ) -> Result<DeviceStatus, Problem> {
        let now = clock::now();
        let is_alive = |link: &LinkRecord| {
            link.replica == self.replica
                || view.presence(ServerRole::Control, &link.replica, now) == Presence::Alive
        };
        let link = link.filter(is_alive);
        if link.is_none() && !view.is_settled(now) {
            return Err(not_known_yet());
        }
        Ok(DeviceStatus {
            connected: link.is_some(),
            connected_since: link.map(|link| link.since),
            registered: credentials.is_registered(&address),
            address,
        })
    }

    /// The first `limit` linked devices behind `after` that `service` reaches.
    async fn linked(
        &self,
        service: &ServiceIdentity,
        mut after: Option<DeviceAddress>,
        limit: usize,
    ) -> Result<BTreeMap<DeviceAddress, Option<LinkRecord>>, Problem> {
        let mut found = BTreeMap::new();
        while found.len() < limit {
            let links = in_time(self.rendezvous.links(after.as_ref(), PAGE_MAX)).await?;
            let Some((last, _)) = links.last() else { break };
            after = Some(last.clone());
            let reached = links.into_iter().filter(|(address, _)| service.reaches(address));
            found.extend(reached.take(limit - found.len()).map(|(address, link)| (address, Some(link))));
        }
        Ok(found)
    }
}
