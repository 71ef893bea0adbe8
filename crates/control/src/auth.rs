//! Who sent a request.

use http::header;
use midspan_core::{
    credential::{AuthError, DeviceIdentity, Permission, ServiceIdentity},
    id::DeviceAddress,
    problem::{Problem, ProblemKind},
};
use midspan_platform::{
    clock,
    http::{HttpRequest, authenticated, header as header_value},
};
use tracing::debug;

use crate::control::Control;

impl Control {
    /// The service that sent `request`.
    pub(crate) fn service(&self, request: &HttpRequest) -> Result<ServiceIdentity, Problem> {
        let header = header_value(request, header::AUTHORIZATION);
        let found = self.credentials.current().authenticate_service(header, &self.hosts, clock::unix());
        let deny = self.secrets.deny.current();
        let allowed = found.and_then(|service| {
            if deny.has_service(&service.name) { Err(AuthError::Revoked) } else { Ok(service) }
        });
        let service = allowed.map_err(|error| self.refuse(&error))?;
        authenticated(request);
        Ok(service)
    }

    /// The service that sent `request`, provided that it may do `permission` at all.
    pub(crate) fn service_that_may(
        &self,
        request: &HttpRequest,
        permission: Permission,
    ) -> Result<ServiceIdentity, Problem> {
        let service = self.service(request)?;
        if service.may(permission) {
            return Ok(service);
        }
        let detail =
            format!("the credential {} lacks the permission `{}`", service.name, permission.as_str());
        Err(Problem::new(ProblemKind::NotAllowed, detail))
    }

    /// Checks that `request` was sent by the device or module `address`.
    pub(crate) fn device(
        &self,
        request: &HttpRequest,
        address: &DeviceAddress,
    ) -> Result<DeviceIdentity, Problem> {
        let header = header_value(request, header::AUTHORIZATION);
        let found =
            self.credentials.current().authenticate_device(header, &self.hosts, address, clock::unix());
        let deny = self.secrets.deny.current();
        let allowed = found
            .and_then(|device| if deny.has_device(address) { Err(AuthError::Revoked) } else { Ok(device) });
        let device = allowed.map_err(|error| self.refuse(&error))?;
        authenticated(request);
        Ok(device)
    }

    fn refuse(&self, error: &AuthError) -> Problem {
        self.metrics.auth_failure(error);
        debug!(reason = error.label(), "credential refused");
        let mut problem = Problem::new(ProblemKind::Unauthorized, error.to_string());
        // Waiting changes nothing, but a new credential does.
        problem.retry = matches!(error, AuthError::Expired { .. });
        problem
    }
}

/// What a service hears that asks for a device outside its scope.
pub(crate) fn out_of_scope(service: &ServiceIdentity, address: &DeviceAddress) -> Problem {
    let detail = format!("the credential {} does not reach device {address}", service.name);
    Problem::new(ProblemKind::NotAllowed, detail)
}
