// Gets tokens through Azure's JavaScript SDKs, as an application in a pod does,
// and says what came of it and how long it took. The one argument, a job, and
// what is printed, a list of results, are those of its sister ../go.
import { DefaultAzureCredential, ManagedIdentityCredential } from "@azure/identity";
import { ManagedIdentityApplication } from "@azure/msal-node";

const job = JSON.parse(process.argv[2]);
const named = (options) => (job.by ? options[job.by] : undefined);

// ofCredential is one call of @azure/identity.
const ofCredential = (credential) => async () => {
  const token = await credential.getToken(job.resource + "/.default");
  return { token: token.token, expires: token.expiresOnTimestamp };
};

const clients = {
  "@azure/identity": () =>
    ofCredential(
      new ManagedIdentityCredential(
        named({ client: { clientId: job.id }, resource: { resourceId: job.id }, object: { objectId: job.id } }),
      ),
    ),
  "@azure/identity default": () => ofCredential(new DefaultAzureCredential(named({ client: { managedIdentityClientId: job.id } }))),
  "@azure/msal-node": () => {
    const id = named({
      client: { userAssignedClientId: job.id },
      resource: { userAssignedResourceId: job.id },
      object: { userAssignedObjectId: job.id },
    });
    const application = new ManagedIdentityApplication(id && { managedIdentityIdParams: id });
    return async () => {
      const result = await application.acquireToken({ resource: job.resource });
      return { token: result.accessToken, expires: result.expiresOn.getTime() };
    };
  },
};

// subject reads whose token it is; those of proxy/imdstest begin with their claims.
const subject = (token) => JSON.parse(Buffer.from(token.split(".")[0], "base64url")).sub;

const get = clients[job.client]();
const results = [];
for (let i = 0; i < job.times; i++) {
  const begin = performance.now();
  let result;
  try {
    const { token, expires } = await get();
    result = { subject: subject(token), minutes: (expires - Date.now()) / 60000 };
  } catch (error) {
    result = { error: String(error) };
  }
  results.push({ ...result, ms: performance.now() - begin });
}
console.log(JSON.stringify(results));
